"""Noise that is made layer by layer: the numbers of the defense, and the noise of few weights in memory at a time."""

import weakref

import pytest
import torch

from lmleak.defenses import GaussianNoise
from lmleak.errors import DataError
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian, InfluenceSolver
from lmleak.influence.perturbation import UnitNoise
from tests.families import make


class WatchedNoise(UnitNoise):
    """Counts, at every draw, the numbers of weights' noise that are still alive from earlier draws."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drawn, self.most_alive = [], 0

    def alive(self):
        kept = [tensor for reference in self.drawn if (tensor := reference()) is not None]
        return sum(tensor.numel() for tensor in kept)

    def __getitem__(self, name):
        self.most_alive = max(self.most_alive, self.alive())
        noise = super().__getitem__(name)
        if noise.dim() > 1:
            self.drawn.append(weakref.ref(noise))
        return noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_what_the_defense_adds(dtype):
    adapter, batch = make("bert", dtype=dtype)
    shared = capture_gradient(adapter, batch)
    noise = InfluenceSolver(GradientJacobian(adapter, batch), adapter.prior(), seed=3).noise()
    noisy = GaussianNoise(std=1.0, seed=3)(shared)
    assert list(noise) == list(shared.gradient)
    assert len(noise) == len(shared.gradient)
    for name, gradient in shared.gradient.items():
        assert torch.equal(gradient + noise[name], noisy.gradient[name])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_with_noise_holds_few_weights_noise_at_a_time(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    adapter, batch = make("gpt2")
    jacobian = GradientJacobian(adapter, batch)
    noise = WatchedNoise(jacobian.parameter_shapes, jacobian.dtype, 0)
    product = jacobian.matvec(noise)
    assert len(noise.drawn) > 9
    largest = max(shape.numel() for shape in jacobian.parameter_shapes.values())
    assert noise.most_alive <= (threads + 2) * largest  # those drawn ahead, the one in use and the one before it
    held = dict(WatchedNoise(jacobian.parameter_shapes, jacobian.dtype, 0))
    assert torch.equal(product, jacobian.matvec(held))


def test_noise_drawn_ahead_is_the_noise_drawn_one_by_one():
    shapes = {"a": torch.Size([3, 5]), "b": torch.Size([7]), "c": torch.Size([300_000]), "d": torch.Size([])}
    noise = UnitNoise(shapes, torch.float32, 2)
    ahead = list(noise.items())
    assert [name for name, _ in ahead] == list(shapes)
    assert all(torch.equal(drawn, noise[name]) for name, drawn in ahead)


def test_a_wrong_shape_is_refused_when_its_turn_comes():
    adapter, batch = make("bert")
    jacobian = GradientJacobian(adapter, batch)
    shapes = dict(jacobian.parameter_shapes)
    name = next(iter(shapes))
    shapes[name] = torch.Size([2])
    with pytest.raises(DataError, match=r"has shape \(2,\)"):
        jacobian.matvec(UnitNoise(shapes, jacobian.dtype, 0))
