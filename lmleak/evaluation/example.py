"""Everything that is measured on one private example: risk numbers, attacks, scores."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from lmleak.adapters.text import TextAdapter
from lmleak.attacks import Attack
from lmleak.defenses import Defense, GaussianNoise, LaplaceNoise, derived_seed
from lmleak.evaluation.features import feature_mse
from lmleak.evaluation.scored import scored_attack, seeded_batch
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.influence import (
    ExpectedInfluence,
    GradientJacobian,
    InfluenceSolver,
    PerturbationResponse,
    expected_influence,
    influence_by_token,
    information_by_layer,
    sample_spectrum,
)
from lmleak.metrics import TextScore
from lmleak.types import Reconstruction, TextBatch


@dataclass(frozen=True)
class Release:
    """One gradient that the server might receive."""

    name: str
    """The defense's public description."""
    shared: SharedGradient
    perturbation: Mapping[str, Tensor]
    """delta = released - true."""
    additive: bool
    """Whether the server receives the true gradient plus independent noise, which is what MAP predictions assume."""
    sweep: bool
    """Whether it belongs to the noise sweep, or is a defense the owner asked for."""
    noise_rms: float | None = None
    """Standard deviation of Gaussian noise in multiples of the gradient's root mean square."""
    noise_std: float | None = None
    """The same in the gradient's unit."""

    @property
    def rms(self) -> float:
        """Root mean square of the perturbation over the released coordinates."""
        squares = sum(d.double().square().sum().item() for d in self.perturbation.values())
        return math.sqrt(squares / self.shared.num_coordinates)


@dataclass(frozen=True)
class ExampleSettings:
    """What is measured; the same for every example."""

    shared: str
    defenses: tuple[tuple[str, Defense], ...]
    """(specification, defense); seeds are replaced per example."""
    noise_levels: tuple[float, ...]
    """Gaussian noise in multiples of the gradient's root mean square."""
    attacks: tuple[tuple[str, Attack], ...]
    """(name in the results, attack)."""
    damping: float | None
    """Fixed damping; None is ``solver.RELATIVE_DAMPING`` times the largest eigenvalue."""
    tolerance: float
    max_products: int
    implementation: str
    """Of the products with J: factored or autodiff."""
    probes: int
    probe_steps: int
    max_length: int | None
    padding_side: str
    seed: int


class ExampleEvaluator:
    """Measures examples of one model.

    Args:
        adapter: The model.
        settings: What is measured.
    """

    def __init__(self, adapter: TextAdapter, settings: ExampleSettings):
        self.adapter, self.settings = adapter, settings

    def check(self, texts: Sequence[str], labels: Sequence[int] | None, *, thoroughly: bool) -> None:
        """Refuse what cannot be measured, before any work; thoroughly: the gradient and every defense as well."""
        s = self.settings
        batch = self.adapter.batch(texts, labels, max_length=s.max_length, padding_side=s.padding_side)
        if thoroughly:
            self._releases(capture_gradient(self.adapter, batch, shared=s.shared), s.seed)

    def verify(self, texts: Sequence[str], labels: Sequence[int] | None) -> float | None:
        """Return how far products by factors are from double backward; None where all go by that."""
        s = self.settings
        if s.implementation != "factored":
            return None
        batch = self.adapter.batch(texts, labels, max_length=s.max_length, padding_side=s.padding_side)
        return self._jacobian(batch).verify(seed=s.seed)

    def rows(self, index: int, texts: Sequence[str], labels: Sequence[int] | None) -> list[dict]:
        """Return one row per release of the gradient of these texts; depends on the index and settings alone."""
        s = self.settings
        seed = derived_seed(s.seed, index)
        batch = seeded_batch(
            self.adapter, texts, labels, max_length=s.max_length, padding_side=s.padding_side, seed=seed
        )
        start = time.perf_counter()
        true = capture_gradient(self.adapter, batch, shared=s.shared)
        gradient_seconds = time.perf_counter() - start
        jacobian = self._jacobian(batch)
        solver = self._solver(jacobian, seed)
        releases = self._releases(true, seed)
        influences = self._influences(solver, releases)
        averages = self._averages(solver, releases)
        layers = information_by_layer(jacobian, self.adapter.roles(), seed=seed)
        common = {
            "example": index,
            "gradient_seconds": gradient_seconds,
            "influence_seconds": time.perf_counter() - start,
            "texts": list(batch.texts),
            "labels": None if labels is None else list(labels),
            "tokens": self._display_tokens(batch),
            "gradient_rms": true.rms,
            "prior_std": solver.prior.std,
            "dx": jacobian.dx,
            "layer_share": {name: layer.share for name, layer in layers.items()},
            "layer_share_std_error": {name: layer.std_error for name, layer in layers.items()},
        }
        return [
            {"key": f"{index}|{release.name}"} | common | self._row(batch, release, seed) | influence | average
            for release, influence, average in zip(releases, influences, averages, strict=True)
        ]

    def _jacobian(self, batch: TextBatch) -> GradientJacobian:
        s = self.settings
        return GradientJacobian(self.adapter, batch, shared=s.shared, implementation=s.implementation)

    def _solver(self, jacobian: GradientJacobian, seed: int) -> InfluenceSolver:
        s = self.settings
        return InfluenceSolver(jacobian, self.adapter.prior(), tol=s.tolerance, max_products=s.max_products, seed=seed)

    def _releases(self, true: SharedGradient, seed: int) -> list[Release]:
        releases = []
        for name, defense in self.settings.defenses:
            released = defense.with_seed(seed).release(true)
            additive = isinstance(defense, GaussianNoise | LaplaceNoise)
            releases.append(Release(name, released.shared, released.perturbation, additive, sweep=False))
        for level in self.settings.noise_levels:
            std = level * true.rms
            released = GaussianNoise(std=std, seed=seed).release(true)
            name = f"gaussian(std={level:g}, unit=rms)"
            releases.append(Release(name, released.shared, released.perturbation, True, True, level, std))
        return releases

    def _influences(self, solver: InfluenceSolver, releases: list[Release]) -> list[dict]:
        """Return the risk numbers of each release; the noise sweep costs one solve."""
        # One damping for all releases, also where a smaller operator has a smaller largest eigenvalue.
        damping = solver.default_damping if self.settings.damping is None else self.settings.damping
        noise = solver.respond(solver.noise(), [damping]) if any(r.sweep for r in releases) else None
        numbers = []
        for release in releases:
            if release.sweep:
                numbers.append(_risk(noise, release, damping, scale=release.noise_std))
                continue
            own = solver
            if release.shared.gradient.keys() != solver.jacobian.parameter_shapes.keys():  # some were withheld
                own = self._solver(solver.jacobian.restrict(release.shared.gradient), solver.seed)
            numbers.append(_risk(own.respond(release.perturbation, [damping]), release, damping))
        return numbers

    def _averages(self, solver: InfluenceSolver, releases: list[Release]) -> list[dict]:
        """Return the averages over the noise, for the releases that are the true gradient plus Gaussian noise."""
        s = self.settings
        stds = [r.noise_std for r in releases if r.sweep]
        if not stds or s.probes == 0:
            return [_average(None) for _ in releases]
        damping = solver.default_damping if s.damping is None else s.damping
        spectrum = sample_spectrum(solver.jacobian, num_probes=s.probes, steps=s.probe_steps, seed=solver.seed)
        averages = iter(expected_influence(spectrum, stds, solver.prior.std, damping=damping))
        return [_average(next(averages) if r.sweep else None) for r in releases]

    def _row(self, batch: TextBatch, release: Release, seed: int) -> dict:
        attacks = {name: self._attack(attack, release.shared, batch, seed) for name, attack in self.settings.attacks}
        return {
            "defense": release.name,
            "sweep": release.sweep,
            "noise_rms": release.noise_rms,
            "noise_std": release.noise_std,
            "perturbation_rms": release.rms,
            "attacks": attacks,
            "seconds": sum(a.get("seconds", 0.0) for a in attacks.values()),
        }

    def _attack(self, attack: Attack, shared: SharedGradient, batch: TextBatch, seed: int) -> dict:
        mask = batch.layout["attention_mask"].bool()
        true_inputs = [x[m] for x, m in zip(self.adapter.input(batch), mask, strict=True)]

        def more(recovered: Reconstruction, score: TextScore) -> dict:
            features = feature_mse(self.adapter, batch, recovered, score)
            examples = score.to_dict()["per_example"]
            return {
                "feature_mse": None if None in features else fmean(features),
                "texts": [e["text"] for e in examples],
                "per_example": [
                    {"text": e["text"], "token_correct": e["correct"], "token_in_bag": e["in_bag"]} for e in examples
                ],
                "objective": recovered.objective,
            }

        return scored_attack(attack, self.adapter, shared, batch, seed=seed, more=more, true_inputs=true_inputs)

    def _display_tokens(self, batch: TextBatch) -> list[list[str]]:
        ids, mask = batch.inputs["input_ids"], batch.layout["attention_mask"].bool()
        return [self.adapter.token_strings(row[m].tolist()) for row, m in zip(ids, mask, strict=True)]


def _risk(response: PerturbationResponse, release: Release, damping: float, *, scale: float = 1.0) -> dict:
    """Return the risk numbers of one release as a row holds them."""
    solver = response.solver
    result = response.influence(damping, scale=scale)
    enclosed = math.isfinite(result.upper_bound.rms)
    noise_std = release.noise_std or release.rms
    predicted = response.predicted_error(noise_std, scale=scale) if release.additive and noise_std > 0 else None
    # Below the default damping nothing is resolved, and a share read there would be too small.
    share_damping = max(solver.map_damping(noise_std), damping)
    mask = solver.jacobian.free[..., 0]
    return {
        "lower_bound_l2": result.lower_bound.l2,
        "lower_bound_rms": result.lower_bound.rms,
        "cg_bound_l2": result.cg_bound.l2,
        "cg_bound_rms": result.cg_bound.rms,
        "influence_l2": result.influence.l2,
        "influence_rms": result.influence.rms,
        "influence_upper_rms": result.upper_bound.rms if enclosed else None,
        "influence_converged": result.converged and enclosed,
        "influence_residual": result.residual,
        "damping": result.damping,
        "lambda_max": result.lambda_max,
        "lambda_max_residual": result.lambda_max_residual,
        "products": result.products,
        "by_autodiff": list(result.by_autodiff),
        "predicted_rms": predicted.error.rms if predicted and predicted.converged else None,
        "null_share_damping": share_damping,
        "null_share": solver.undetermined_share(share_damping),
        "token_influence": [list(row) for row in influence_by_token(result, mask)],
    }


def _average(average: ExpectedInfluence | None) -> dict:
    """Return the averages over the noise as a row holds them; None where there are none, or none that converged."""
    response = average if average and average.response_converged else None
    bayes = average if average and average.bayes_converged else None
    return {
        "expected_rms": response and response.response.rms,
        "expected_std_error": response and response.response_std_error,
        "bayes_rms": bayes and bayes.bayes.rms,
        "bayes_std_error": bayes and bayes.bayes_std_error,
        "effective_rank": bayes and bayes.effective_rank,
        "effective_rank_std_error": bayes and bayes.effective_rank_std_error,
        "information_nats": bayes and bayes.information,
        "information_std_error": bayes and bayes.information_std_error,
        "expected_products": average and average.products,
    }
