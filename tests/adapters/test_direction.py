"""Whether a model attends both ways is found by running it, not by its name."""

import pytest

from lmleak.adapters.structure import sees_ahead
from lmleak.errors import UnsupportedModelError
from tests.families import FAMILIES, make

ENCODERS = {"bert", "bert-mlm", "distilbert", "roberta", "unlisted-electra"}


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_and_decoders_are_told_apart(name):
    adapter, _ = make(name)
    assert adapter.is_causal == (name not in ENCODERS)


def test_a_block_that_never_runs_is_an_error():
    adapter, _ = make("bert")
    with pytest.raises(UnsupportedModelError, match="never reached"):
        sees_ahead(adapter.model, adapter.blocks[0], lambda last: None)
