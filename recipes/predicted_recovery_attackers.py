"""The attackers whose success the recipe predicted_recovery compares with its predictions.

The two local ones start at the truth and know what ``lmleak.influence.recovery`` assumes known: they measure what the
released gradient tells an attacker whose search does not fail, and nothing of how hard that search is.
"""

import torch
from torch import Tensor

from lmleak.adapters import TextAdapter
from lmleak.attacks import parse_attack
from lmleak.defenses import derived_seed
from lmleak.defenses.noise import unit_noise
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients import SharedGradient
from lmleak.gradients.capture import gradient_of
from lmleak.influence.recovery import RecoveryPredictor
from lmleak.influence.recovery_substitution import CHUNK, text_gradients
from lmleak.types import TextBatch

SWEEPS = 5  # of the discrete attacker over all positions


def unit_noises(true: SharedGradient, seed: int) -> dict[str, Tensor]:
    """Return the noise that ``GaussianNoise(seed=seed)`` adds, for standard deviation 1."""
    return {n: unit_noise(n, g.shape, g.dtype, seed).to(g.device) for n, g in true.gradient.items()}


def local_map(
    predictor: RecoveryPredictor, true: SharedGradient, std: float, seed: int, iterations: int
) -> tuple[list[bool], float]:
    """Minimise the MAP objective from the truth with targets known, and decode by cosine similarity.

    Coordinates are whitened by the linearised posterior, x = x0 + (A / sigma^2 + I / tau^2)^-1/2 u, in which the
    Hessian at the truth is the identity: L-BFGS then needs tens of steps where it did not converge in x.

    Returns:
        Hits per private token, and the final gradient's rms in u: distance to the optimum in posterior deviations.
    """
    adapter, batch, problem = predictor.adapter, predictor.batch, predictor.problem
    names, prior = predictor.selection.names, adapter.prior()
    noise = unit_noises(true, seed)
    x0 = adapter.input(batch)
    mask = predictor.private.unsqueeze(-1).expand_as(x0)
    root = problem.vectors * (problem.values / std**2 + prior.std**-2).rsqrt()
    root = (root @ problem.vectors.T).to(x0)
    u = torch.zeros(len(root), dtype=x0.dtype, device=x0.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [u], max_iter=iterations, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=1e-4
    )

    def embeddings() -> Tensor:
        return x0.masked_scatter(mask, x0[mask] + root @ u)

    def objective() -> Tensor:
        optimizer.zero_grad()
        x = embeddings()
        gradient, _ = gradient_of(adapter, x, batch.targets, batch.layout, names, create_graph=True)
        away = {n: (gradient[n] - true.gradient[n]).double() / std for n in names}
        # ||away - noise||^2 without ||noise||^2, which would drown in rounding what the line search compares.
        misfit = sum((away[n] * (away[n] - 2 * noise[n])).sum() for n in names)
        value = (misfit + ((x - prior.mean)[mask].double() / prior.std).square().sum()) / 2
        (u.grad,) = torch.autograd.grad(value, u)
        return value.detach()

    optimizer.step(objective)
    objective()
    decoded = adapter.nearest_tokens(embeddings().detach()[predictor.private]).cpu()
    return (decoded == predictor.tokens).tolist(), u.grad.square().mean().sqrt().item()


class DiscreteAttacker:
    """Maximises the exact likelihood over tokens, one position at a time, from the truth; any noise level.

    The gradients of all single substitutions serve every level and are computed once: where none of them beats the
    truth, the ascent ends there. Otherwise positions are swept with all candidates and the gradient of the text as it
    stands. (With a short list made at the truth it kept up to 0.6 of its start under noise that hides everything.)
    """

    def __init__(self, predictor: RecoveryPredictor, true: SharedGradient, seeds: list[int]):
        self.predictor, self.names = predictor, predictor.selection.names
        self.origin = self._flat({n: g[None] for n, g in true.gradient.items()})[0]
        self.noise = torch.stack([self._flat({n: z[None] for n, z in unit_noises(true, s).items()})[0] for s in seeds])
        self.places = predictor.private.nonzero().tolist()
        self.candidates = predictor.nearest()
        ids = predictor.batch.inputs["input_ids"]
        effects = [self._effects(ids, place, c) for place, c in zip(self.places, self.candidates, strict=True)]
        self.squared = torch.stack([squared for squared, _ in effects])  # (N, C)
        self.along = torch.stack([along for _, along in effects])  # (N, C, draws)

    def _flat(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[n].reshape(len(gradients[n]), -1) for n in self.names], dim=1)

    def _effects(self, ids: Tensor, place: list[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return ||g(text) - g||^2 and <g(text) - g, noise> for every token at one place."""
        texts = ids.repeat(len(tokens), 1, 1)
        texts[:, place[0], place[1]] = tokens.to(ids)
        squared, along = [], []
        for chunk in texts.split(CHUNK):
            away = self._flat(text_gradients(self.predictor.adapter, self.predictor.batch, chunk, self.names))
            away -= self.origin
            squared.append(away.square().sum(1))
            along.append(away @ self.noise.T)
        return torch.cat(squared), torch.cat(along)

    def hits(self, std: float) -> list[list[bool]]:
        """Return, per noise draw, whether each token stayed right."""
        return [self._ascend(std, draw) for draw in range(len(self.noise))]

    def _ascend(self, std: float, draw: int) -> list[bool]:
        single = std * self.along[..., draw] - self.squared / 2
        single[:, 0] = 0.0  # the truth itself, exactly
        state = self.predictor.batch.inputs["input_ids"].clone()
        for _ in range(SWEEPS if bool((single > 0).any()) else 0):
            before = state.clone()
            for place, known in zip(self.places, self.candidates, strict=True):
                squared, along = self._effects(state, place, known)
                # From the truth outwards: of equal candidates the first, so that nothing moves without a gain.
                state[place[0], place[1]] = known[(std * along[:, draw] - squared / 2).argmax().item()]
            if torch.equal(state, before):
                break
        return (state[self.predictor.private].cpu() == self.predictor.tokens).tolist()


def attack_hits(spec: str, adapter: TextAdapter, noisy, batch: TextBatch, seed: int) -> list[list[bool]] | None:
    """Return whether each token is right at its position; None if the attack does not apply."""
    try:
        recovered = parse_attack(spec).run(adapter, noisy, seed=derived_seed(seed, 2))
    except UnsupportedCombinationError:
        return None
    guess = recovered.token_ids[0] if recovered.token_ids else ()
    return [[i < len(guess) and guess[i] == token for i, token in enumerate(batch.token_ids[0])]]
