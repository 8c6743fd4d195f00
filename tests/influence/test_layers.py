"""One layer alone and all but one: against dense float64 algebra."""

import pytest
import torch

from lmleak.errors import ConfigError
from lmleak.influence import GradientJacobian, influence_of_layers
from lmleak.influence.solver import InfluenceSolver
from tests.families import make

SETTINGS = {"tol": 1e-6, "max_products": 1000}


def dense_release(jacobian, prior, noise_std, seed, kept):
    """Return (MAP error, noise's part, undetermined share) by torch.linalg on the kept columns of J."""
    matrix, noise = jacobian.to_dense(), InfluenceSolver(jacobian, prior, seed=seed).noise()
    columns = torch.cat([torch.full((s.numel(),), n in kept) for n, s in jacobian.parameter_shapes.items()])
    delta = noise_std * torch.cat([noise[n].reshape(-1) for n in jacobian.parameter_names])
    part = matrix[:, columns]
    gram = part @ part.T
    deviation = jacobian.flatten(jacobian.x - prior.mean)
    damping = (noise_std / prior.std) ** 2
    system = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
    response = torch.linalg.solve(system, part @ delta[columns])
    shrinkage = damping * torch.linalg.solve(system, deviation)
    undetermined = (shrinkage.norm() / deviation.norm()).item() ** 2
    return (response - shrinkage).norm().item(), response.norm().item(), undetermined


def problem(name, problems):
    return problems.small_lenet() if name == "lenet" else make(name, size=2)


@pytest.mark.parametrize("name", ["lenet", "bert", "gpt2"])
def test_layers_match_dense_algebra(name, problems):
    adapter, batch = problem(name, problems)
    jacobian = GradientJacobian(adapter, batch)
    std = 0.03 * torch.linalg.eigvalsh(jacobian.to_dense() @ jacobian.to_dense().T)[-1].sqrt().item()
    layers = {r: names for r, names in adapter.roles().items() if name == "lenet" or r in ("block 0", "head")}
    found = influence_of_layers(adapter, batch, noise_std=std, seed=3, layers=layers, **SETTINGS)
    assert list(found) == list(layers)
    for layer, got in found.items():
        names = set(adapter.roles()[layer])
        assert got.converged
        assert got.dx == jacobian.dx
        assert got.products == got.only.products + got.without.products > 0
        for part, kept in ((got.only, names), (got.without, set(jacobian.parameter_names) - names)):
            error, noise, undetermined = dense_release(jacobian, adapter.prior(), std, 3, kept)
            assert part.map_error.l2 == pytest.approx(error, rel=1e-4)
            assert part.influence.l2 == pytest.approx(noise, rel=1e-4, abs=1e-12)
            assert part.undetermined == pytest.approx(undetermined, rel=1e-4, abs=1e-9)
            assert part.map_error.rms == pytest.approx(part.map_error.l2 / got.dx**0.5)


def test_hiding_a_layer_never_helps_the_attacker_on_average(problems):
    """The mean over noise is sigma^2 tr((A + d I)^-1) for x of the prior; here x is fixed, hence a little slack."""
    adapter, batch = problems.small_lenet()
    jacobian = GradientJacobian(adapter, batch)
    std = 0.01 * torch.linalg.eigvalsh(jacobian.to_dense() @ jacobian.to_dense().T)[-1].sqrt().item()
    everything = {"all": jacobian.parameter_names}
    layers = {layer: adapter.roles()[layer] for layer in ("body.0", "fc")}
    run = lambda layers, seed: influence_of_layers(adapter, batch, noise_std=std, layers=layers, seed=seed)
    whole = sum(run(everything, s)["all"].only.map_error.l2 ** 2 for s in range(4))
    runs = [run(layers, s) for s in range(4)]
    for layer in layers:
        for part in ("only", "without"):
            assert sum(getattr(r[layer], part).map_error.l2 ** 2 for r in runs) > 0.97 * whole, (layer, part)


def test_a_single_layer_leaves_the_prior_when_it_is_withheld(problems):
    adapter, batch = problems.small_lenet()
    (found,) = influence_of_layers(adapter, batch, noise_std=1e-3, shared="fc").values()
    deviation = adapter.input(batch).norm().item()  # the prior's mean is 0
    assert found.without.map_error.l2 == pytest.approx(deviation)
    assert (found.without.undetermined, found.without.products) == (1.0, 0)
    assert found.only.map_error.l2 < deviation
    # The last layer's gradient is (p - y) h^T: the logits' 2 free directions and h move with x.
    assert found.only.undetermined < 1


def test_every_layer_that_is_shared_is_measured(problems):
    adapter, batch = problems.make("gpt2-untied", size=1)
    found = influence_of_layers(adapter, batch, noise_std=1e-2, shared="block:0-1")
    assert list(found) == ["block 0", "block 1"]


def test_own_division_of_the_layers(problems):
    adapter, batch = problems.small_lenet()
    roles = adapter.roles()
    body = [n for layer, names in roles.items() if layer != "fc" for n in names]
    found = influence_of_layers(
        adapter, batch, noise_std=1e-3, layers={"body": body, "head": roles["fc"], "absent": ("x",)}, **SETTINGS
    )
    assert list(found) == ["body", "head"]
    assert found["body"].only == found["head"].without or (
        found["body"].only.map_error.l2 == pytest.approx(found["head"].without.map_error.l2, rel=1e-4)
    )


def test_a_run_cut_short_says_so(problems):
    adapter, batch = problems.small_lenet()
    found = influence_of_layers(adapter, batch, noise_std=1e-6, max_products=3)
    assert not any(part.converged for part in found.values())


def test_refusals(problems):
    adapter, batch = problems.small_lenet()
    with pytest.raises(ConfigError, match="noise_std must be positive"):
        influence_of_layers(adapter, batch, noise_std=0.0)
    with pytest.raises(ConfigError, match="none of the layers"):
        influence_of_layers(adapter, batch, noise_std=1e-3, layers={"head": ("nothing",)})
