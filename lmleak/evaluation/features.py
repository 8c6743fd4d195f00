"""How far the model's own view of a recovered text is from that of the private one."""

import torch
from torch import Tensor

from lmleak.adapters.text import TextAdapter
from lmleak.metrics import TextScore
from lmleak.types import Reconstruction, TextBatch


def feature_mse(
    adapter: TextAdapter, batch: TextBatch, recovered: Reconstruction, score: TextScore
) -> list[float | None]:
    """Return the mean squared difference of the logits of each recovered and private text.

        FMSE_i = mean_k (f(xhat_i) - f(x_i))_k^2,   k over classes, or over positions x vocabulary,

    in squared logits, on each text alone (no padding). xhat are the recovered embeddings where the attack returns
    them, else those of the recovered tokens, with the public special tokens in their places. Source: the feature
    error of Zhang et al. 2023 (arXiv:2309.13016), figures for language models.

    Args:
        adapter: The model.
        batch: The private batch.
        recovered: What the attack returned.
        score: Its score on this batch, for the assignment of predictions to texts.

    Returns:
        One number per private text; None where the prediction has another length, or there is none.
    """
    errors: list[float | None] = []
    for i, example in enumerate(score.per_example):
        real = batch.layout["attention_mask"][i].bool()
        ids = batch.inputs["input_ids"][i][real]
        layout = {name: tensor[i][real][None] for name, tensor in batch.layout.items()}
        guess = None if example.prediction is None else _input(adapter, ids, recovered, example.prediction)
        if guess is None:
            errors.append(None)
            continue
        with torch.no_grad():
            difference = adapter.logits(guess[None], layout) - adapter.logits(adapter.embed(ids)[None], layout)
        errors.append(difference.double().square().mean().item())
    return errors


def _input(adapter: TextAdapter, ids: Tensor, recovered: Reconstruction, prediction: int) -> Tensor | None:
    """Return the recovered input of one text, (T, D), or None if it has another length."""
    if recovered.embeddings is not None:
        x = recovered.embeddings[prediction]
        return x if len(x) == len(ids) else None
    tokens = recovered.token_ids[prediction]
    special = torch.tensor(sorted(adapter.special_ids()), dtype=ids.dtype, device=ids.device)
    private = ~torch.isin(ids, special)
    if int(private.sum()) != len(tokens):
        return None
    return adapter.embed(ids.masked_scatter(private, torch.tensor(tokens, dtype=ids.dtype, device=ids.device)))
