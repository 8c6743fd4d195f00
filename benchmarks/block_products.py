"""Several products at once against one by one: vectors of one example, and one vector each of several examples.

    python -m benchmarks.block_products                    # tiny models, BERT-base, GPT-2 small, images: ten minutes
    python -m benchmarks.block_products --device cuda --shapes bert-base gpt2 gpt2-medium --tokens 32 128 512

"probes": A v for k vectors through the graphs of one example, batched, against k single products. "examples": A_i v_i
of k examples of one length through one graph, every layer's factors by example, against k operators. The latter is
built here only, for the weights of linear maps (a table of positions serves all examples at once and would need a
change of its own); results/block_products.md says why it went no further. Both equal the single products to rounding,
which is checked. Times alternate in one process, the least of ``--repeats``: of the processor on a CPU, of the clock
on a GPU. Memory: what the widest pass needs above what one product left resident (CPU) or allocated (GPU).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.cases import device, markdown, run_cases, shape_source, shown, table, whole_number
from benchmarks.influence_measures import load, random_batch
from benchmarks.meters import clock
from benchmarks.product import peak_resident_mib
from lmleak.influence.factors import LinearFactor

PROBES = [
    ("reference-bert", 8), ("reference-bert", 32), ("reference-gpt2", 8), ("reference-gpt2", 32), ("bert-base", 32),
    ("bert-base", 128), ("gpt2", 32), ("gpt2", 128), ("lenet", None), ("resnet20", None), ("resnet18", None),
]  # fmt: skip
EXAMPLES = [("reference-bert", 8), ("reference-bert", 32), ("reference-gpt2", 8), ("reference-gpt2", 32),
            ("bert-base", 32)]  # fmt: skip
TOLERANCE = 1e-4  # float32


def main() -> None:
    """Measure every case in a process of its own, print the table and write it beside the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", help="names in configs/models, for load_adapter, or of image models")
    parser.add_argument("--tokens", nargs="+", type=whole_number, default=[32, 128])
    parser.add_argument("--counts", nargs="+", type=whole_number, default=[1, 2, 4, 8], help="products at once")
    parser.add_argument("--threads", type=whole_number, default=1)
    parser.add_argument("--repeats", type=whole_number, default=3)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--output", default=None, help="by default runs/benchmarks/block_products-DEVICE.jsonl")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        print(json.dumps(MEASURES[case.pop("measure")](**case)))
        return
    chosen = options.shapes and [(shape, tokens) for shape in options.shapes for tokens in options.tokens]
    settings = {k: getattr(options, k) for k in ("counts", "threads", "repeats", "device")}
    cases = [
        {"measure": measure, "shape": shape, "tokens": tokens, **settings}
        for measure, plan in (("probes", PROBES), ("examples", EXAMPLES))
        for shape, tokens in chosen or plan
    ]
    output = Path(options.output or f"runs/benchmarks/block_products-{options.device.partition(':')[0]}.jsonl")
    with run_cases("benchmarks.block_products", cases, str(output)) as rows:
        if not rows:
            return
        titles = ["", "ms of one", *(f"{k} at once" for k in options.counts), "set-up", "MiB of the widest"]
        lines = [line(row, options.counts) for row in rows]
        title = "Time of products one by one over that of products at once"
        Console(width=140).print(table(title, titles, lines))
        page = markdown(title, titles, lines, rows[-1]["provenance"], __doc__.partition("\n\n")[2])
        output.with_suffix(".md").write_text(page, encoding="utf-8")


def line(row: dict, counts: list[int]) -> list[str]:
    """Return a case's cells."""
    length = f", {row['tokens']} tokens" if row["tokens"] else ""
    ratios = [shown(row["ratios"].get(str(k))) for k in counts]
    name = f"{row['measure']}: {row['shape']}{length}"
    return [name, shown(row["ms"]), *ratios, *(shown(row.get(k)) for k in ("setup_ratio", "block_mib"))]


def measure_probes(shape: str, tokens: int | None, counts: list[int], threads: int, repeats: int, device: str) -> dict:
    """Return how products of one example with several vectors compare, through one operator."""
    from lmleak import GradientJacobian

    torch.set_num_threads(threads)
    jacobian = GradientJacobian(*example(shape, tokens, device))
    jacobian.block_size = max(counts)
    operator = jacobian.gram_operator()
    columns = normal(jacobian.dx, max(counts), like=jacobian.x)
    operator.matvec(columns[:, 0].contiguous())  # makes what the others reuse
    block_mib = peak_mib(lambda: jacobian._gram_columns(columns), device)
    figures = {"measure": "probes", "shape": shape, "tokens": tokens, "ratios": {}, "block_mib": block_mib}
    for count in counts:
        vectors = columns[:, :count]
        separate = lambda vectors=vectors: torch.stack([operator.matvec(v) for v in vectors.T.contiguous()], dim=1)
        # Also one vector goes through the batched pass here, which the operator itself would spare it.
        single, block = compared(separate, lambda vectors=vectors: jacobian._gram_columns(vectors), repeats, device)
        figures["ratios"][count] = single / block
    return figures | {"ms": 1e3 * single / count}


class ExampleFactor(LinearFactor):
    """The gradients of one linear map's weight by several examples, each on its own.

    Args:
        factor: Of the batch.
        count: Examples, the first axis of the factor's tensors.
    """

    def __init__(self, factor: LinearFactor, count: int):
        self.count = count
        super().__init__(*factor.tensors, transposed=factor.transposed, grouped=True)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.count, -1, tensor.shape[-1])


def measure_examples(shape: str, tokens: int, counts: list[int], threads: int, repeats: int, device: str) -> dict:
    """Return how products of several examples compare, one vector each, through one graph and through their own."""
    torch.set_num_threads(threads)
    adapter, _ = example(shape, tokens, device)
    figures = {"measure": "examples", "shape": shape, "tokens": tokens, "ratios": {}}
    for count in counts:
        single, block, setup_ratio = of_examples(adapter, random_batch(adapter, count, tokens), count, repeats, device)
        figures["ratios"][count] = single / block
    return figures | {"ms": 1e3 * single / count, "setup_ratio": setup_ratio}


def of_examples(adapter, batch, count: int, repeats: int, device: str) -> tuple[float, float, float]:
    """Return the seconds of ``count`` products one by one and at once, and the ratio of the set-ups."""
    from lmleak import GradientJacobian
    from lmleak.influence.factored import FactoredProducts

    selection, parameters = adapter.select("no-word-embeddings"), adapter.parameters()
    theta = {n: parameters[n] for n in selection.names}
    labels = [0] if adapter.task == "sequence-classification" else None
    texts = [adapter.batch([ids], labels) for ids in batch.inputs["input_ids"].tolist()]

    def separate_operators() -> list[GradientJacobian]:
        return [GradientJacobian(adapter, text) for text in texts]

    def one_operator() -> FactoredProducts:
        # The mean over examples of one length, times their number: every example's own gradient by its part of x.
        loss = lambda theta, x: count * adapter.shared_loss(batch, x, theta, selection)
        products = FactoredProducts(loss, theta, adapter.input(batch), adapter.model)
        linear = {n: f for n, f in products.factors.items() if type(f) is LinearFactor}
        products.factors = {n: ExampleFactor(f, count) for n, f in linear.items()}
        return products

    jacobians, products = separate_operators(), one_operator()
    setups = [(seconds(separate_operators, device), seconds(one_operator, device)) for _ in range(repeats)]
    names = tuple(products.factors)
    vectors = normal(*products.x.shape, like=products.x)
    pairs = [(j.restrict(names), v[None]) for j, v in zip(jacobians, vectors, strict=True)]
    single, block = compared(
        lambda: torch.cat([part.gram(v) for part, v in pairs]), lambda: products.gram(vectors, names), repeats, device
    )
    return single, block, min(a for a, _ in setups) / min(b for _, b in setups)


def example(shape: str, tokens: int | None, device: str) -> tuple:
    """Return the adapter and one random example: a text, or an image where the shape is an image model."""
    from lmleak import adapt
    from lmleak.adapters.image_models import ARCHITECTURES, image_model

    if shape not in ARCHITECTURES:
        adapter = load(shape_source(shape), None, None, device)
        return adapter, random_batch(adapter, 1, tokens)
    model = image_model(shape)
    adapter = adapt(model.to(device), task="image-classification")
    return adapter, adapter.batch(normal(1, *model.image_shape, like=next(model.parameters())), [0])


def normal(*shape: int, like: Tensor) -> Tensor:
    """Return seeded Gaussian numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def compared(separate: Callable, together: Callable, repeats: int, device: str) -> tuple[float, float]:
    """Return the least seconds of both ways, which alternate; they must agree."""
    expected, got = separate(), together()
    if not (got - expected).norm() <= TOLERANCE * expected.norm():
        raise AssertionError(f"products at once differ by {((got - expected).norm() / expected.norm()).item():.1e}")
    times = [(seconds(separate, device), seconds(together, device)) for _ in range(repeats)]
    return min(a for a, _ in times), min(b for _, b in times)


def seconds(action: Callable, device: str) -> float:
    """Return the seconds of an action: of the processor on a CPU, so that others on the machine do not count."""
    if device != "cpu":
        return clock(action, device)[0]
    start = time.process_time()
    action()
    return time.process_time() - start


def peak_mib(action: Callable, device: str) -> float:
    """Return the peak memory of an action above what was held before it."""
    if device == "cpu":
        return peak_resident_mib(action)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


MEASURES = {"probes": measure_probes, "examples": measure_examples}

if __name__ == "__main__":
    main()
