"""One example over two processes: probes and restarts are split, and the numbers are those of one process."""

from dataclasses import replace

import pytest
import torch
from accelerate import PartialState

import lmleak
from lmleak.attacks import DLG, Span
from lmleak.errors import ConfigError
from lmleak.evaluation.run import finish, process_state
from lmleak.evaluation.split import split_restarts, split_spectrum
from lmleak.influence import GradientJacobian, expected_influence, sample_spectrum
from tests.families import make
from tests.launching import fork

ATTACK = DLG(iterations=6, candidates=2, restarts=3)


def problem():
    """A tiny GPT-2 in float64, and one text."""
    return make("gpt2", size=1)


def everything(state: PartialState) -> dict:
    adapter, batch = problem()
    jacobian = GradientJacobian(adapter, batch)
    spectrum = split_spectrum(jacobian, state, num_probes=5, steps=12, seed=3)
    (average,) = expected_influence(spectrum, [1e-3], 1.0, damping=1e-6)
    recovered = split_restarts(ATTACK, adapter, lmleak.capture_gradient(adapter, batch), state, seed=3)
    return {
        "average": average,
        "products": spectrum.products,
        "recovered": replace(recovered, cost=replace(recovered.cost, seconds=0.0, peak_bytes=None)),
    }


def in_two(path: str) -> None:
    state = process_state()
    torch.save(everything(state), f"{path}-{state.process_index}")
    finish(state)


@pytest.fixture(scope="module")
def alone():
    return everything(PartialState(cpu=True))


@pytest.mark.multiprocess
def test_two_processes_give_the_numbers_of_one(alone, tmp_path):
    fork(in_two, str(tmp_path / "found"))
    for process in range(2):
        found = torch.load(tmp_path / f"found-{process}", weights_only=False)
        assert found["average"] == alone["average"]  # bit for bit
        assert found["products"] == alone["products"] == 5 * 12
        ours, theirs = found["recovered"], alone["recovered"]
        assert all(torch.equal(a, b) for a, b in zip(ours.embeddings, theirs.embeddings, strict=True))
        assert replace(ours, embeddings=None) == replace(theirs, embeddings=None)


def test_split_numbers_are_those_of_the_plain_functions(alone):
    adapter, batch = problem()
    jacobian = GradientJacobian(adapter, batch)
    spectrum = sample_spectrum(jacobian, num_probes=5, steps=12, seed=3)
    average = expected_influence(spectrum, [1e-3], 1.0, damping=1e-6)[0]  # of products side by side: up to rounding
    for name in ("effective_rank", "information", "response_std_error", "bayes_std_error"):
        assert getattr(alone["average"], name) == pytest.approx(getattr(average, name), rel=1e-9)
    assert alone["average"].response.rms == pytest.approx(average.response.rms, rel=1e-9)
    assert alone["average"].products == average.products
    plain = ATTACK.run(adapter, lmleak.capture_gradient(adapter, batch), seed=3)
    assert alone["recovered"].token_ids == plain.token_ids
    assert alone["recovered"].objective == pytest.approx(plain.objective, rel=1e-9)  # side by side there, alone here
    assert alone["recovered"].cost.gradient_evaluations == plain.cost.gradient_evaluations
    for ours, theirs in zip(alone["recovered"].embeddings, plain.embeddings, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_what_cannot_be_split_is_refused():
    adapter, batch = problem()
    state = PartialState(cpu=True)
    jacobian = GradientJacobian(adapter, batch)
    with pytest.raises(ConfigError, match="no restarts to split"):
        split_restarts(Span(), adapter, lmleak.capture_gradient(adapter, batch), state)
    with pytest.raises(ConfigError, match="num_probes"):
        split_spectrum(jacobian, state, num_probes=1)
