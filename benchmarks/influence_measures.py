"""What benchmarks.influence measures, one function per process; see there."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import Tensor

from benchmarks.meters import clock, device_peak_gib, host_peak_gib, median, peak_gib, report, restart_peak
from benchmarks.reference import (
    DESCENT_STEPS,
    ParameterSpace,
    descent_step,
    parameter_space_lambda_max,
    plain_gradient,
)

BOUND_TOLERANCE = 0.01
LIKELY = 0.05  # failure probability beside the solver's own 1e-3
RELATIVE_DAMPING, RESIDUAL = 1e-4, 1e-3
CERTIFIED_PRODUCTS = 10
PROBES, PROBE_STEPS = 2, 280
PUBLISHED_STEPS = {"dlg": 2500, "tag": 2500, "gs": 2000}
"""Steps per restart of the published text attacks: LAMP's harness (arXiv:2202.08827) runs DLG and TAG for 2,500 and
the cosine objective for 2,000."""


def measure(
    group: str, shape: str, tokens: list[int], pieces: list[str], device: str, threads: int,
    batch: int = 1, layers: int | None = None, width: int | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Yield the figures of one process: one row per length.

    Args:
        group: Which measure.
        shape: Name for ``load_adapter``.
        tokens: Lengths.
        pieces: Which of the group's pieces.
        device: Where.
        threads: CPU threads.
        batch: Texts per gradient.
        layers: Number of layers instead of the shape's.
        width: Hidden size instead of the shape's.

    Raises:
        SystemExit: If the shape is no language model.
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    adapter = load(shape, layers, width, device)
    if adapter.task == "image-classification":
        raise SystemExit(f"{shape} classifies images; these benchmarks are of language models")
    parameters = sum(p.numel() for p in adapter.parameters().values())
    common = {
        "shape": Path(shape).stem, "device": device, "threads": threads, "batch": batch, "layers": layers,
        "width": width, "parameters": parameters,
    }  # fmt: skip
    for length in tokens:
        if (most := adapter.max_positions()) and length > most:
            yield common | {"tokens": length, "skipped": f"at most {most} positions"}
            continue
        restart_peak(device)
        private = random_batch(adapter, batch, length)
        yield common | {"tokens": length} | MEASURES[group](adapter, private, pieces, device)


def load(shape: str, layers: int | None, width: int | None, device: str):
    """Return the adapter of a shape, with another number of layers or hidden size where given (heads of 64)."""
    from lmleak import load_adapter

    if layers is None and width is None:
        return load_adapter(shape, device=device)
    description = yaml.safe_load(Path(shape).read_text(encoding="utf-8"))
    gpt2 = description["model_type"] == "gpt2"
    config = description["config"]
    if layers is not None:
        config["n_layer" if gpt2 else "num_hidden_layers"] = layers
    if width is not None:
        sizes = {"n_embd": width} if gpt2 else {"hidden_size": width, "intermediate_size": 4 * width}
        config |= sizes | {"n_head" if gpt2 else "num_attention_heads": max(1, width // 64)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shape.yaml"
        path.write_text(yaml.safe_dump(description), encoding="utf-8")
        return load_adapter(str(path), device=device)


def random_batch(adapter, batch: int, tokens: int):
    """Return random texts of one length, the same for every model."""
    ids = torch.randint(10, 1000, (batch, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return adapter.batch(ids, [0] * batch if adapter.task == "sequence-classification" else None)


# The risk numbers ------------------------------------------------------------------------------------------


def influence(adapter, batch, pieces: list[str], device: str) -> dict:
    """Return the cost of each risk number and the numbers themselves."""
    from lmleak import GradientJacobian
    from lmleak.influence import InfluenceSolver, expected_influence, sample_spectrum
    from lmleak.linops import krylov_solve, lanczos, top_eigenvalue_from_image

    timed = partial(clock, device=device)
    gradient_seconds, gradient = median(lambda: plain_gradient(adapter, batch), device)
    noise_std = rms(gradient)
    del gradient
    figures = {"gradient_seconds": gradient_seconds, "gradient_peak_gib": peak_gib(device)}

    def cost(piece: str, seconds: float, products: int | None = None, unit: float = gradient_seconds) -> None:
        figures.update({
            f"{piece}_seconds": seconds, f"{piece}_gradients": seconds / unit,
            f"{piece}_peak_gib": peak_gib(device), **({} if products is None else {f"{piece}_products": products}),
        })  # fmt: skip
        counted = "" if products is None else f", {products} products"
        report(f"{piece}: {seconds:.3g} s, {seconds / unit:.3g} gradients{counted}")

    setup_seconds, jacobian = timed(lambda: GradientJacobian(adapter, batch))
    jacobian.gram(jacobian.free.to(jacobian.dtype))  # the first product makes what the others reuse
    v = torch.randn(jacobian.x.shape, generator=torch.Generator().manual_seed(1)).to(jacobian.x)
    pairs = [(timed(lambda: plain_gradient(adapter, batch))[0], timed(lambda: jacobian.gram(v))[0]) for _ in range(5)]
    figures["dx"] = jacobian.dx
    cost("setup", setup_seconds)
    beside, product = (sorted(seconds)[2] for seconds in zip(*pairs, strict=True))
    cost("product", product, unit=beside)

    solver_to = lambda tol: InfluenceSolver(jacobian, adapter.prior(), tol=tol, max_products=600)
    noise = solver_to(BOUND_TOLERANCE).noise()
    cost("response", timed(lambda: jacobian.matvec(noise))[0])
    if {"bound", "certified", "damped", "sweep", "expected"} & set(pieces):
        del jacobian

        def bound_from_nothing() -> InfluenceSolver:
            operator = GradientJacobian(adapter, batch)
            solver = InfluenceSolver(operator, adapter.prior(), tol=BOUND_TOLERANCE / 2)
            solver.lambda_max  # noqa: B018 (draws the noise as well)
            return solver

        bound_seconds, solver = median(bound_from_nothing, device, runs=3, warm_up=False)
        jacobian, bracket = solver.jacobian, solver.lambda_max
        bound = solver.noise_run.start_norm / bracket.upper
        figures |= {"lambda_max": bracket.upper, "bound_l2": noise_std * bound, "bound_converged": bracket.converged}
        cost("bound", bound_seconds, bracket.iterations)
        near = lambda run: run.ritz_values()[-1] >= (1 - BOUND_TOLERANCE) * bracket.value
        settings = {"tol": BOUND_TOLERANCE, "failure_probability": LIKELY}
        likely = lambda run: top_eigenvalue_from_image(run, max_products=run.dimension, **settings).converged
        figures["bound_seen_products"] = products_until(solver.noise_run, near)
        figures["bound_likely_products"] = products_until(solver.noise_run, likely)
        damping = RELATIVE_DAMPING * bracket.value
    if "certified" in pieces:
        run = lambda: lanczos(solver.operator, solver.response(noise), max_products=CERTIFIED_PRODUCTS)
        seconds, krylov = timed(run)
        (undamped,) = krylov_solve(krylov, [0.0])
        figures["certified_over_bound"] = undamped.lower_bounds[-1] / bound
        cost("certified", setup_seconds + seconds, krylov.dimension)
    if {"damped", "sweep"} & set(pieces):
        solver = solver_to(RESIDUAL)
        seconds, ((result,),) = timed(lambda: solver.sweep([noise_std], [damping]))
        figures |= {"damped_rms": result.influence.rms, "residual": result.residual, "converged": result.converged}
        figures["damped_width"] = result.upper_bound.l2 / result.influence.l2 - 1
        solved = lambda run: krylov_solve(run, [damping])[0]
        enclosed = lambda found: found.upper_bound <= (1 + BOUND_TOLERANCE) * found.norm
        figures["damped_enclosed_products"] = products_until(solver.noise_run, lambda run: enclosed(solved(run)))
        cost("damped", setup_seconds + seconds, result.products)
    if "sweep" in pieces:
        levels, dampings = [noise_std * 10**k for k in range(-4, 4)], [damping * 10**k for k in range(4)]
        sweep_seconds, _ = timed(lambda: solver_to(RESIDUAL).sweep(levels, dampings))
        figures["sweep_ratio"] = sweep_seconds / seconds
        cost("sweep", sweep_seconds)
    if "expected" in pieces:
        sample = lambda: sample_spectrum(jacobian, num_probes=PROBES, steps=PROBE_STEPS)
        seconds, spectrum = timed(sample)
        (average,) = expected_influence(spectrum, [noise_std], adapter.prior().std, damping=damping)
        figures |= {
            "expected_rms": average.response.rms, "expected_converged": average.response_converged,
            "expected_relative_error": average.response_std_error / average.response.rms,
            "effective_rank": average.effective_rank, "effective_rank_std_error": average.effective_rank_std_error,
            "effective_rank_converged": average.bayes_converged,
        }  # fmt: skip
        cost("expected", setup_seconds + seconds, spectrum.products)
    return figures


def products_until(krylov, holds: Callable) -> int | None:
    """Return after how many products something first held of a run, None if it never did."""
    return next((k for k in range(1, krylov.dimension + 1) if holds(krylov.after(k))), None)


def noise_response(solver, noise_std: float) -> Tensor:
    """Return J delta for seeded Gaussian noise, (dx,)."""
    return noise_std * solver.response(solver.noise())


def rms(gradient: list[Tensor]) -> float:
    """Return the root mean square over all coordinates."""
    squares = sum(g.double().square().sum().item() for g in gradient)
    return (squares / sum(g.numel() for g in gradient)) ** 0.5


# What it is compared with ----------------------------------------------------------------------------------


def published(adapter, batch, pieces: list[str], device: str) -> dict:
    """Return the cost of the published algorithm."""
    from lmleak.influence.perturbation import UnitNoise

    gradient_seconds, gradient = median(lambda: plain_gradient(adapter, batch), device)
    noise_std = rms(gradient)
    del gradient
    space = ParameterSpace(adapter, batch)
    figures = {}
    if "descent" in pieces:
        noise = UnitNoise({n: p.shape for n, p in space.parameters.items()}, space.x.dtype, seed=0)
        delta = [noise_std * drawn.to(space.x) for _, drawn in noise.items()]
        b = torch.zeros_like(space.x)
        step_seconds, _ = median(lambda: descent_step(space, b, delta, 1.0), device, runs=2)
        del delta
        seconds = step_seconds * DESCENT_STEPS
        figures |= {"descent_step_seconds": step_seconds, "descent_steps": DESCENT_STEPS, "descent_seconds": seconds,
                    "descent_gradients": seconds / gradient_seconds}  # fmt: skip
        report(f"descent: {step_seconds:.3g} s a step, {seconds:.3g} s for {DESCENT_STEPS} (extrapolated)")
    for piece in ("eigsh", "released"):
        if piece in pieces:
            space.calls = 0
            find = partial(parameter_space_lambda_max, space, grown=piece == "released")
            seconds, value = clock(find, device)
            figures |= {
                f"{piece}_seconds": seconds, f"{piece}_gradients": seconds / gradient_seconds,
                f"{piece}_calls": space.calls, f"{piece}_lambda_max": value,
                f"{piece}_peak_gib": host_peak_gib() + device_peak_gib(device),
            }  # fmt: skip
            report(f"{piece}: {space.calls} calls, {seconds:.3g} s")
    return figures


def attacks(adapter, batch, pieces: list[str], device: str) -> dict:
    """Return the cost of a step of each matching attack, and of the published number of steps, extrapolated."""
    from lmleak import capture_gradient
    from lmleak.attacks.descent import BETAS, Matching
    from lmleak.attacks.matching import DLG, GS, TAG
    from lmleak.attacks.relaxed_text import RelaxedText

    gradient_seconds, _ = median(lambda: plain_gradient(adapter, batch), device)
    observation = capture_gradient(adapter, batch).observation(lengths=True, labels=True)
    figures = {}
    for attack in (DLG(), TAG(), GS()):
        problem = Matching(attack, RelaxedText(adapter, observation), observation)
        start = problem.text.draw(torch.Generator().manual_seed(0), 1.0)
        guess = start.with_tensors(t.detach()[None].clone().requires_grad_() for t in start.tensors())
        optimizer = torch.optim.AdamW(guess.tensors(), betas=BETAS)

        def step(problem=problem, guess=guess, optimizer=optimizer) -> None:
            _, slopes = problem.slopes(guess)
            for unknown, slope in zip(guess.tensors(), slopes, strict=True):
                unknown.grad = slope / slope.norm()
            optimizer.step()

        step_seconds, _ = median(step, device, runs=3)
        seconds = step_seconds * PUBLISHED_STEPS[attack.name]
        figures |= {
            f"{attack.name}_step_gradients": step_seconds / gradient_seconds, f"{attack.name}_seconds": seconds,
            f"{attack.name}_steps": PUBLISHED_STEPS[attack.name],
        }  # fmt: skip
        report(
            f"{attack.name}: {step_seconds / gradient_seconds:.3g} gradients a step, {seconds:.3g} s (extrapolated)"
        )
    return figures | {"attacks_peak_gib": peak_gib(device)}


def agreement(adapter, batch, pieces: list[str], device: str) -> dict:
    """Return the largest relative difference of gradient, product, J delta, lambda_max and I2F from the CPU's."""
    import copy

    from lmleak import GradientJacobian, adapt
    from lmleak.influence import InfluenceSolver

    def numbers(adapter) -> dict[str, Tensor]:
        private = random_batch(adapter, *batch.inputs["input_ids"].shape)
        gradient = torch.cat([g.flatten() for g in plain_gradient(adapter, private)])
        jacobian = GradientJacobian(adapter, private)
        v = torch.randn(jacobian.x.shape, generator=torch.Generator().manual_seed(1)).to(jacobian.x)
        solver = InfluenceSolver(jacobian, adapter.prior())
        damping = 1e-2 * solver.lambda_max.value
        result = solver.sweep([rms([gradient])], [damping])[0][0]
        values = {
            "gradient": gradient, "product": jacobian.gram(v), "response": noise_response(solver, 1.0),
            "lambda_max": torch.tensor(result.lambda_max), "influence": torch.tensor(result.influence.l2),
        }  # fmt: skip
        return {name: value.detach().double().cpu() for name, value in values.items()}

    there = numbers(adapter)
    here = numbers(adapt(copy.deepcopy(adapter.model).cpu(), tokenizer=adapter.tokenizer, task=adapter.task))
    differences = {f"{n}_difference": ((there[n] - here[n]).norm() / here[n].norm()).item() for n in here}
    return differences | {"agreement": max(differences.values())}


MEASURES = {
    "influence": influence, "published": published, "released": published, "attacks": attacks, "agreement": agreement,
}  # fmt: skip
