"""Exact texts from LoRA gradients, fresh and trained, and refusal where the rank is too small."""

import pytest
import torch

from lmleak.attacks.lora_span import LoraSpan
from lmleak.errors import UnsupportedCombinationError
from tests.gradients.test_readout_lora import lora_case

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft on Conv1D


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [0, 3], ids=["fresh", "trained"])
@pytest.mark.parametrize(("rank", "size"), [(8, 1), (14, 3)])
def test_recovers_all_but_the_last_tokens(rank, size, steps, dtype):
    adapter, batch, shared = lora_case("gpt2", rank=rank, size=size, steps=steps, dtype=dtype)
    recovered = LoraSpan().run(adapter, shared)
    assert sorted(recovered.token_ids) == sorted(text[:-1] for text in batch.token_ids)
    assert min(min(row) for row in recovered.confidence) > 0.99


def test_refuses_more_tokens_than_ranks():
    adapter, _, shared = lora_case("gpt2", rank=8, size=2, steps=0)
    with pytest.raises(UnsupportedCombinationError, match="void: at r = 8"):
        LoraSpan().run(adapter, shared)
