"""What a step of gradient matching costs, in units of one gradient of the same model and run.

    python -m benchmarks.matching                        # embedded GPT-2 and BERT, BERT-base shape with 4 blocks
    python -m benchmarks.matching --models reference-gpt2 --tokens 16 --repeats 20

Per model and attack: a step (gradient, backward through it, optimiser), a step of a plain implementation (below), the
scoring of a candidate alone and among up to 16, a step of a restart alone and among up to 8. A gradient is what
``loss.backward()`` computes, on the same text. Medians after a warm-up.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.descent import BETAS, DECAYS, Matching, stacked
from lmleak.attacks.matching import DLG, GS, TAG, GradientMatching
from lmleak.attacks.objectives import layer_scales
from lmleak.attacks.relaxed_text import RelaxedText
from lmleak.types import Observation

MODELS = ["reference-gpt2", "reference-bert", "bert-base, 4 blocks"]
GUESSES = 16
RESTARTS = 8


def plain_loss_curve(
    attack: GradientMatching, adapter: ModelAdapter, observation: Observation, *, seed: int
) -> list[float]:
    """Return the objectives of DLG or TAG step by step, written as the formula: a fresh graph, torch.optim, no more.

    Args:
        attack: DLG or TAG with its options; one restart, one candidate.
        adapter: The model.
        observation: What the server sees.
        seed: Seed of the start.

    Returns:
        One objective per iteration.
    """
    step = plain_step(attack, adapter, observation, seed=seed)
    return [step(iteration) for iteration in range(attack.iterations)]


def plain_step(
    attack: GradientMatching, adapter: ModelAdapter, observation: Observation, *, seed: int
) -> Callable[[int], float]:
    """Return one step of the plain implementation, as a function of the iteration."""
    text = RelaxedText(adapter, observation)
    guess = text.draw(torch.Generator().manual_seed(seed), attack.init_scale)
    unknowns = [t.requires_grad_() for t in guess.tensors()]
    scales = layer_scales(observation.gradient, attack.balance)
    target = {n: scales[n] * g for n, g in observation.gradient.items()}
    l1_norm = sum(t.abs().sum() for t in target.values())
    alpha = getattr(attack, "alpha", 0.0)
    optimizer = torch.optim.AdamW(
        [{"params": unknowns[:1], "weight_decay": attack.prior_pull}, {"params": unknowns[1:], "weight_decay": 0.0}],
        betas=BETAS,
    )

    def distance() -> Tensor:
        theta = {n: p.clone().requires_grad_() for n, p in adapter.parameters().items() if n in target}
        loss = adapter.loss(text.x(guess), text.targets(guess), text.layout, theta)
        gradient = torch.autograd.grad(
            loss, list(theta.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        total = torch.zeros((), dtype=loss.dtype)
        for name, g in zip(theta, gradient, strict=True):
            difference = scales[name] * g - target[name]
            total = total + (difference**2).sum() + alpha * difference.abs().sum() / l1_norm
        return total

    def step(iteration: int) -> float:
        optimizer.zero_grad()
        objective = distance()
        for unknown, slope in zip(unknowns, torch.autograd.grad(objective, unknowns), strict=True):
            unknown.grad = slope / slope.norm()
        for group in optimizer.param_groups:
            group["lr"] = attack.learning_rate * DECAYS[attack.decay](iteration / attack.iterations)
        optimizer.step()
        return objective.item()

    return step


def load(name: str) -> ModelAdapter:
    """Return a model by name; the BERT-base shape is cut to four blocks, to fit a small machine."""
    from lmleak import adapt, load_adapter

    if name != "bert-base, 4 blocks":
        return load_adapter(name)
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=4, num_labels=4))
    return adapt(model, tokenizer=load_adapter("reference-bert").tokenizer, name=name)


def medians(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of actions, run in turn so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}


def measure(name: str, attack: GradientMatching, tokens: int, repeats: int) -> dict[str, float]:
    """Return the costs of one model and attack, in gradients (``gradient`` itself in seconds)."""
    from lmleak import capture_gradient

    adapter = load(name)
    ids = torch.randint(10, 1000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = adapter.batch([ids], None if adapter.task == "causal-lm" else [1])
    observation = capture_gradient(adapter, batch).observation(lengths=True, labels=True)
    problem = Matching(attack, RelaxedText(adapter, observation), observation)
    generator = torch.Generator().manual_seed(0)
    guesses = [problem.text.draw(generator, 1.0) for _ in range(GUESSES)]
    together = problem.together

    def stack(count: int):
        return guesses[0].with_tensors(t.requires_grad_() for t in stacked(guesses[:count]))

    def with_width(width: int, action: Callable[[], object]) -> object:
        problem.together = width
        return action()

    # Where one gradient fills the allowance, two at once show what more would bring.
    many, restarts = (min(most, max(2, together)) for most in (GUESSES, RESTARTS))
    one, several, x = stack(1), stack(restarts), adapter.input(batch)
    optimizer = torch.optim.AdamW(one.tensors(), betas=BETAS)

    def gradient():
        theta = {n: p.requires_grad_() for n, p in adapter.parameters().items() if n in problem.observed}
        torch.autograd.grad(
            adapter.loss(x, batch.targets, batch.layout, theta), list(theta.values()), allow_unused=True
        )

    def step():
        value, slopes = problem.slopes(one)
        for tensor, slope in zip(one.tensors(), slopes, strict=True):
            tensor.grad = slope / slope.norm()
        optimizer.step()
        return value.item()

    actions = {
        "gradient": gradient,
        "step": step,
        "candidate": lambda: with_width(1, lambda: problem.distances(guesses[:1])),
        "candidate of many": lambda: with_width(many, lambda: problem.distances(guesses[:many])),
        "step of many": lambda: problem.slopes(several),
    }
    if not isinstance(attack, GS):
        plain = plain_step(attack, adapter, observation, seed=0)
        actions["plain step"] = lambda: plain(0)
    seconds = medians(actions, repeats)
    shared = {"candidate of many": many, "step of many": restarts}
    costs = {key: value / shared.get(key, 1) / seconds["gradient"] for key, value in seconds.items()}
    return costs | {"gradient": seconds["gradient"], "together": together}


def main() -> None:
    """Measure every model and attack, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names for load_adapter, or the 4-block shape")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the text")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    columns = ["gradient", "step", "plain step", "candidate", "candidate of many", "step of many", "together"]
    sizes = f"{options.tokens} tokens, {options.threads} threads"
    grid = Table(title=f"Cost in gradients ({sizes}; gradient in ms; together: guesses at once)")
    for title in ("model", "attack", *columns):
        grid.add_column(title, justify="right")
    for name in options.models:
        for attack in (DLG(), TAG(), GS()):
            costs = measure(name, attack, options.tokens, options.repeats)
            costs["gradient"] *= 1e3
            shown = (costs.get(column, math.nan) for column in columns)
            grid.add_row(name, attack.name, *(f"{value:.3g}" for value in shown))
    Console(width=140).print(grid)


if __name__ == "__main__":
    main()
