"""Everything that is measured on one private example: risk numbers, attacks, scores."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from lmleak.adapters.text import TextAdapter
from lmleak.attacks import Attack
from lmleak.defenses import Defense, GaussianNoise, derived_seed
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.influence import (
    ExpectedInfluence,
    GradientJacobian,
    InfluenceResult,
    InfluenceSolver,
    expected_influence,
    influence_by_token,
    information_by_layer,
    null_share,
    sample_spectrum,
)
from lmleak.metrics import score_text
from lmleak.types import TextBatch

RESOLUTION = 1e-6  # damping, relative to lambda_max, below which float32 products cannot tell an eigenvalue from zero


@dataclass(frozen=True)
class Release:
    """One gradient that the server might receive."""

    name: str
    """The defense's public description."""
    shared: SharedGradient
    perturbation: Mapping[str, Tensor]
    """delta = released - true."""
    sweep: bool
    """Whether it belongs to the noise sweep, or is a defense the owner asked for."""
    noise_rms: float | None = None
    """Standard deviation of Gaussian noise in multiples of the gradient's root mean square."""
    noise_std: float | None = None
    """The same in the gradient's unit."""


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
    """Fixed damping; None is the MAP attacker's."""
    tolerance: float
    max_products: int
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

    def rows(self, index: int, texts: Sequence[str], labels: Sequence[int] | None) -> list[dict]:
        """Return one row per release of the gradient of these texts; depends on the index and settings alone."""
        s = self.settings
        seed = derived_seed(s.seed, index)
        batch = self.adapter.batch(
            texts, labels, max_length=s.max_length, padding_side=s.padding_side, seed=seed % 2**31
        )
        start = time.perf_counter()
        true = capture_gradient(self.adapter, batch, shared=s.shared)
        gradient_seconds = time.perf_counter() - start
        jacobian = GradientJacobian(self.adapter, batch, shared=s.shared)
        solver = self._solver(jacobian, seed)
        releases = self._releases(true, seed)
        influences = self._influences(solver, releases, seed)
        averages = self._averages(jacobian, releases, seed)
        layers = information_by_layer(jacobian, self.adapter.roles(), seed=seed)
        common = {
            "example": index,
            "gradient_seconds": gradient_seconds,
            "influence_seconds": time.perf_counter() - start,
            "texts": list(batch.texts),
            "labels": None if labels is None else list(labels),
            "tokens": self._display_tokens(batch),
            "gradient_rms": true.rms,
            "prior_std": solver.prior_std,
            "dx": jacobian.dx,
            "layer_share": {name: layer.share for name, layer in layers.items()},
            "layer_share_std_error": {name: layer.std_error for name, layer in layers.items()},
        }
        return [
            self._row(batch, release, influence, share, average, common, seed)
            for release, (influence, share), average in zip(releases, influences, averages, strict=True)
        ]

    def _solver(self, jacobian: GradientJacobian, seed: int) -> InfluenceSolver:
        s = self.settings
        return InfluenceSolver(
            jacobian, self.adapter.prior().std, tol=s.tolerance, max_products=s.max_products, seed=seed
        )

    def _releases(self, true: SharedGradient, seed: int) -> list[Release]:
        releases = []
        for name, defense in self.settings.defenses:
            released = defense.with_seed(seed).release(true)
            releases.append(Release(name, released.shared, released.perturbation, sweep=False))
        for level in self.settings.noise_levels:
            std = level * true.rms
            released = GaussianNoise(std=std, seed=seed).release(true)
            name = f"gaussian(std={level:g}, unit=rms)"
            releases.append(Release(name, released.shared, released.perturbation, True, level, std))
        return releases

    def _influences(
        self, solver: InfluenceSolver, releases: list[Release], seed: int
    ) -> list[tuple[InfluenceResult, float]]:
        """Return I2F and the undetermined share of x per release; the noise sweep costs one solve."""
        damping = self.settings.damping
        stds = [r.noise_std for r in releases if r.sweep]
        swept = iter(solver.sweep(stds, None if damping is None else [damping]) if stds else [])
        results = []
        for release in releases:
            own = solver
            if release.shared.gradient.keys() != solver.jacobian.parameter_shapes.keys():  # some were withheld
                own = self._solver(solver.jacobian.restrict(release.shared.gradient), seed)
            result = next(swept)[0] if release.sweep else own.solve(release.perturbation, damping=damping)
            results.append((own, result))
        # One Krylov run from x serves all releases of the same operator.
        shares: dict[int, dict[float, float]] = {}
        for own, _ in results:
            if id(own) not in shares:
                dampings = sorted({self._resolved_damping(r) for o, r in results if o is own})
                shares[id(own)] = dict(zip(dampings, null_share(own.jacobian, dampings), strict=True))
        return [(r, shares[id(own)][self._resolved_damping(r)]) for own, r in results]

    @staticmethod
    def _resolved_damping(result: InfluenceResult) -> float:
        return max(result.damping, RESOLUTION * result.lambda_max)

    def _averages(
        self, jacobian: GradientJacobian, releases: list[Release], seed: int
    ) -> list[ExpectedInfluence | None]:
        """Return the averages over the noise for the releases that are the true gradient plus Gaussian noise."""
        s = self.settings
        stds = [r.noise_std for r in releases if r.noise_std]
        if not stds or s.probes == 0:
            return [None for _ in releases]
        spectrum = sample_spectrum(jacobian, num_probes=s.probes, steps=s.probe_steps, seed=seed)
        averages = iter(expected_influence(spectrum, stds, self.adapter.prior().std))
        return [next(averages) if r.noise_std else None for r in releases]

    def _row(self, batch, release, influence, share, average, common, seed) -> dict:
        squares = sum(d.double().square().sum().item() for d in release.perturbation.values())
        mask = batch.layout["attention_mask"]
        attacks = {name: self._attack(attack, release.shared, batch, seed) for name, attack in self.settings.attacks}
        return common | {
            "key": f"{common['example']}|{release.name}",
            "defense": release.name,
            "sweep": release.sweep,
            "noise_rms": release.noise_rms,
            "noise_std": release.noise_std,
            "perturbation_rms": math.sqrt(squares / release.shared.num_coordinates),
            "lower_bound_l2": influence.lower_bound.l2,
            "lower_bound_rms": influence.lower_bound.rms,
            "cg_bound_l2": influence.cg_bound.l2,
            "cg_bound_rms": influence.cg_bound.rms,
            "influence_l2": influence.influence.l2,
            "influence_rms": influence.influence.rms,
            "influence_converged": influence.converged,
            "influence_residual": influence.residual,
            "damping": influence.damping,
            "lambda_max": influence.lambda_max,
            "lambda_max_residual": influence.lambda_max_residual,
            "products": influence.products,
            "expected_rms": average and average.response.rms,
            "expected_std_error": average and average.response_std_error,
            "bayes_rms": average and average.bayes.rms,
            "bayes_std_error": average and average.bayes_std_error,
            "expected_converged": average and average.converged,
            "effective_rank": average and average.effective_rank,
            "information_nats": average and average.information,
            "null_share": share,
            "token_influence": [list(row) for row in influence_by_token(influence, mask)],
            "attacks": attacks,
            "seconds": sum(a.get("seconds", 0.0) for a in attacks.values()),
        }

    def _attack(self, attack: Attack, shared: SharedGradient, batch: TextBatch, seed: int) -> dict:
        try:
            recovered = attack.run(self.adapter, shared, seed=seed)
        except UnsupportedCombinationError as error:
            return {"refused": str(error)}
        mask = batch.layout["attention_mask"].bool()
        true_inputs = [x[m] for x, m in zip(self.adapter.input(batch), mask, strict=True)]
        scores = score_text(recovered, batch, true_inputs).to_dict()
        examples = scores.pop("per_example")
        return scores | {
            "texts": [e["text"] for e in examples],
            "per_example": [
                {"text": e["text"], "token_correct": e["correct"], "token_in_bag": e["in_bag"]} for e in examples
            ],
            **asdict(recovered.cost),
            "stopped": recovered.stopped,
            "objective": recovered.objective,
            "notes": list(recovered.notes),
        }

    def _display_tokens(self, batch: TextBatch) -> list[list[str]]:
        ids, mask = batch.inputs["input_ids"], batch.layout["attention_mask"].bool()
        return [self.adapter.token_strings(row[m].tolist()) for row, m in zip(ids, mask, strict=True)]
