"""One very large example over several processes: probe vectors and restarts are split, and everyone gets the result.

The model is replicated and nothing is wrapped. Every process draws all random starts, in one order, and works on those
of its own number; so one process and several differ by nothing but which of them worked.
"""

from dataclasses import replace

import torch
from accelerate import PartialState

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.descent import restart_seeds
from lmleak.attacks.matching import GradientMatching
from lmleak.errors import ConfigError
from lmleak.evaluation.run import gather
from lmleak.gradients.shared import SharedGradient
from lmleak.influence.jacobian import InputJacobian
from lmleak.linops import SpectralSample, probe_quadrature, random_start
from lmleak.types import Reconstruction


def split_spectrum(
    jacobian: InputJacobian, state: PartialState, *, num_probes: int = 8, steps: int = 40, seed: int = 0
) -> SpectralSample:
    """Sample the spectrum of A = J J^T as ``sample_spectrum`` does, its probes split over the processes.

    Args:
        jacobian: J of the same example on every process.
        state: This process's place.
        num_probes: Random probes, at least 2, of all processes together.
        steps: Products per probe.
        seed: Seed of the probes.

    Returns:
        The sample that one process would have drawn, on every process.

    Raises:
        ConfigError: If there are too few probes.
    """
    if num_probes < 2:
        raise ConfigError(f"num_probes must be at least 2 (one probe has no standard error), got {num_probes}")
    operator, generator = jacobian.gram_operator(), torch.Generator().manual_seed(seed)
    own = []
    for k in range(num_probes):
        start = random_start(operator, generator, "rademacher")
        if k in _own(num_probes, state):
            own.append((k, *probe_quadrature(operator, start, steps=steps)))
    _, quadratures, products = zip(*sorted(gather(own, state), key=lambda probe: probe[0]), strict=True)
    return SpectralSample(quadratures, operator.shape[0], sum(products), exact=False)


def split_restarts(
    attack: GradientMatching, adapter: ModelAdapter, shared: SharedGradient, state: PartialState, *, seed: int = 0
) -> Reconstruction:
    """Run the restarts of a matching attack one by one, split over the processes, and return the best.

    Restart k draws what it draws in ``attack.run``, which may run several side by side: the same up to rounding, which
    a long descent amplifies. There a perfect match ends the others as well; here it ends those of its own process.

    Args:
        attack: The attack with its number of restarts.
        adapter: The model.
        shared: The released gradient, the same on every process.
        state: This process's place.
        seed: Seed of the attack.

    Returns:
        The reconstruction of lowest objective, with the gradients and steps of all restarts; its seconds are those of
        the slowest process.

    Raises:
        ConfigError: If the attack has no restarts.
    """
    if not isinstance(attack, GradientMatching):
        raise ConfigError(f"attack {attack.name!r} has no restarts to split; write dlg, tag, gs or lamp")
    seeds, one = restart_seeds(seed, attack.restarts), replace(attack, restarts=1)
    own: list[tuple[float, int, Reconstruction]] = []
    for k in _own(attack.restarts, state):
        found = one.run(adapter, shared, seed=seeds[k])
        objective = float("inf") if found.objective is None else found.objective
        own.append((objective, k, found))
        if objective <= attack.loss_tolerance:
            break
    seconds = gather([sum(found.cost.seconds for *_, found in own)], state)
    runs = gather([(objective, k, _on_cpu(found)) for objective, k, found in own], state)
    best = min(runs, key=lambda run: run[:2])[2]
    costs = [found.cost for *_, found in runs]
    total = replace(
        best.cost, seconds=max(seconds), gradient_evaluations=sum(cost.gradient_evaluations for cost in costs),
        iterations=sum(cost.iterations for cost in costs),
    )  # fmt: skip
    return replace(best, cost=total)


def _own(count: int, state: PartialState) -> range:
    """Return the numbers below ``count`` that are this process's: every num_processes-th."""
    return range(state.process_index, count, state.num_processes)


def _on_cpu(found: Reconstruction) -> Reconstruction:
    """Return a reconstruction whose tensors any process can hold."""
    return found if found.embeddings is None else replace(found, embeddings=tuple(x.cpu() for x in found.embeddings))
