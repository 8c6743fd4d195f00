"""The benchmark of several products at once: what it times are the same numbers both ways."""

import pytest
import torch

from benchmarks import block_products
from tests.families import make


def test_products_at_once_are_compared_only_where_they_agree():
    """Both ways of the benchmark, in float64: one example with several vectors, several examples with one each."""
    adapter, _ = make("bert", size=1)
    ids = [[7, 12, 33, 41], [50, 8, 17, 28], [30, 11, 44, 19]]
    single, block, setup_ratio = block_products.of_examples(adapter, adapter.batch(ids, [0, 0, 0]), 3, 1, "cpu")
    assert min(single, block, setup_ratio) > 0
    figures = block_products.measure_probes("lenet", None, [1, 3], 1, 1, "cpu")
    assert set(figures["ratios"]) == {1, 3}
    vector = torch.ones(3)
    with pytest.raises(AssertionError, match="differ by 1"):
        block_products.compared(lambda: vector, lambda: 1.1 * vector, 1, "cpu")
