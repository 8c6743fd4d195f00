"""Which tokens a noisy gradient still tells, and who finds them.

    python -m benchmarks.robustness                                    # the embedded language model, two messages
    python -m benchmarks.robustness --model configs/models/gpt2.yaml --batch 4 --tokens 12

Compared on the same gradients: a threshold check of the first layer as it is widely used (numerical rank, relative
distance below a constant), the calibrated energy from the first map's gradient alone (queries) and from all maps that
read the tensor, stacked, and the sparse explanation of the stacked gradient that ``noisy-span`` uses; each as the
share of visible tokens among the 2 B best of their position. Then the texts that ``noisy-span`` returns. Noise is
relative to the RMS of the whole released gradient, and of the stacked one beside it.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lmleak
from lmleak.attacks.span_layers import forward
from lmleak.attacks.span_score import FirstLayerScore, soft_row_space
from lmleak.attacks.span_sparse import SparseFirstLayer
from lmleak.attacks.span_subspace import stacked_gradient
from lmleak.defenses import parse_defense

DEFENSES = ["none", "bf16", "quantize(bits=8)", *(f"gaussian(std={level}, unit=rms)" for level in (0.01, 0.1, 0.3, 1))]
THRESHOLD = 1e-3
TEXTS = ["my blood test came back positive", "please call me at noon tomorrow"]


def main() -> None:
    """Measure every defense and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="reference-gpt2", help="a decoder: shape file, directory or embedded name")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="random tokens per text; the embedded messages if not given")
    parser.add_argument("--defenses", nargs="+", default=DEFENSES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    adapter = lmleak.load_adapter(options.model)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, options.tokens or 0)
    texts = torch.randint(adapter.vocabulary_size, shape, generator=generator).tolist() if options.tokens else TEXTS
    batch = adapter.batch(texts)
    shared = lmleak.capture_gradient(adapter, batch, reveal_lengths=False)
    table = Table("defense", "noise / stacked RMS", "threshold", "queries only", "stacked", "explained",
                  "noisy-span recall", "precision", "seconds",
                  title=f"{adapter.name}, {batch.size} texts")  # fmt: skip
    for spec in options.defenses:
        table.add_row(spec, *measure(adapter, batch, shared, parse_defense(spec, seed=options.seed)(shared)))
    Console(width=140).print(table)


def measure(adapter, batch, shared, released) -> list[str]:
    """Return the figures of one release."""
    paths = adapter.attention_inputs(0)
    clean, noisy = (stacked_gradient(adapter, s.gradient, paths) for s in (shared, released))
    ratio = (noisy - clean).square().mean().sqrt() / clean.square().mean().sqrt()
    # A fused map starts with the queries.
    queries = noisy[: adapter.width] if len(paths) == 1 else stacked_gradient(adapter, released.gradient, paths[:1])
    found = lmleak.run_attack("noisy-span", adapter, released)
    score = lmleak.score_text(found, batch)
    recalls = [
        threshold_recall(adapter, batch, noisy),
        recall(adapter, batch, queries, FirstLayerScore),
        recall(adapter, batch, noisy, FirstLayerScore),
        recall(adapter, batch, noisy, SparseFirstLayer),
    ]
    figures = [ratio.item(), *recalls, score.token_recall, score.token_precision, found.cost.seconds]
    return [f"{figure:.2g}" for figure in figures]


def visible(batch) -> list[tuple[int, int]]:
    """Return the distinct (position, token) pairs that reach the loss."""
    ids, mask = batch.inputs["input_ids"].tolist(), batch.layout["attention_mask"].sum(1).tolist()
    return sorted({(p, t) for row, length in zip(ids, mask, strict=True) for p, t in enumerate(row[: length - 1])})


def recall(adapter, batch, rows: Tensor, kind: type[FirstLayerScore]) -> float:
    """Return the share of visible tokens among the 2 B best of their position, or 2 N where there are no positions."""
    pairs = visible(batch)
    scores = kind(adapter, adapter.attention_inputs(0)[0], soft_row_space(rows), seed=0)
    surprise = scores.surprise(0, 1 if scores.position_free else 1 + max(p for p, _ in pairs))
    best = surprise.topk(2 * (len(pairs) if scores.position_free else batch.size), dim=0).indices
    return sum(bool((best[:, 0 if scores.position_free else p] == t).any()) for p, t in pairs) / len(pairs)


def threshold_recall(adapter, batch, rows: Tensor) -> float:
    """Return the share of visible tokens that the published test accepts, wrongly accepted ones not counted.

    Petrov et al. 2024, arXiv:2405.15586: rank by ``matrix_rank``, at most d - 20; a basis of as many right singular
    vectors; a token is accepted within a constant relative distance.
    """
    rank = min(int(torch.linalg.matrix_rank(rows.double(), rtol=1e-7)), max(1, adapter.width - 20))
    basis = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:rank].T
    pairs = visible(batch)
    length = 1 + max(p for p, _ in pairs)
    ids = torch.tensor([t for _, t in pairs])[:, None].expand(-1, length)
    x = forward(adapter, ids, stop_at=adapter.attention_inputs(0)[0]).double()
    x = x[torch.arange(len(pairs)), torch.tensor([p for p, _ in pairs])]
    distance = (x - (x @ basis) @ basis.T).norm(dim=-1) / x.norm(dim=-1)
    return (distance < THRESHOLD).double().mean().item()


if __name__ == "__main__":
    main()
