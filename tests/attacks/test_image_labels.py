"""Class labels of images from the last layer's gradient: exact for one image, bounded or estimated for several."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn

import lmleak
from lmleak.adapters import LeNet, VisionAdapter, adapt
from lmleak.attacks.image_labels import class_labels, last_layer
from lmleak.types import Aggregation


def pixels(size: int, side: int = 12, seed: int = 0):
    return torch.rand(size, 1, side, side, generator=torch.Generator().manual_seed(seed))


def lenet(seed: int = 0):
    return adapt(LeNet(size=12, seed=seed).double())


def observe(adapter, images, labels, **keywords):
    shared = lmleak.capture_gradient(adapter, adapter.batch(images, labels), shared="all", **keywords)
    return shared.observation(lengths=False, labels=False)


def without(observation, *names):
    return replace(observation, gradient={n: g for n, g in observation.gradient.items() if n not in names})


class NoBias(nn.Module):
    image_shape = (1, 12, 12)

    def __init__(self, classes: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features, self.head = nn.Linear(144, 40), nn.Linear(40, classes, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.features(x.flatten(1))))


@pytest.mark.parametrize("label", range(10))
def test_one_image_is_exact_with_and_without_the_bias(label):
    adapter = lenet()
    observation = observe(adapter, pixels(1, seed=label), [label])
    for seen in (observation, without(observation, "fc.bias"), without(observation, "fc.weight")):
        found = class_labels(adapter, seen)
        assert found.exact
        assert found.assignment(seen).tolist() == [label]


def test_one_image_behind_a_head_of_mixed_signs():
    adapter = adapt(NoBias(5).double())
    for label in range(5):
        observation = observe(adapter, pixels(1, seed=label), [label])
        assert class_labels(adapter, observation).assignment(observation).tolist() == [label]


@pytest.mark.parametrize(
    "labels", [[0, 3, 7, 9], [1, 1, 1, 8], [2, 2, 2, 2], [0, 1, 2, 3, 4, 5, 6, 7], [5, 5, 0, 0, 9]]
)
def test_counts_of_a_batch(labels):
    hits = 0
    for seed in range(5):
        adapter = lenet(seed)
        observation = observe(adapter, pixels(len(labels), seed=seed), labels)
        found = class_labels(adapter, observation)
        guess, truth = found.counts, torch.bincount(torch.tensor(labels), minlength=10)
        hits += torch.equal(guess, truth)
        assert not found.exact or torch.equal(guess, truth)
        assert guess.sum() == len(labels)
    assert hits >= 4


def test_certain_counts_say_so():
    adapter = lenet()
    with torch.no_grad():
        for p in (adapter.model.fc.weight, adapter.model.fc.bias):
            p.mul_(1e-6)  # p = 1/10 for every image, so that B db_k is in (-1, 0) where label k occurs once
    observation = observe(adapter, pixels(4), [0, 3, 7, 9])
    found = class_labels(adapter, observation)
    assert found.exact
    assert found.assignment(observation).tolist() == [0, 3, 7, 9]


def test_counts_without_the_bias_are_estimates():
    adapter = lenet()
    observation = without(observe(adapter, pixels(4), [0, 3, 3, 9]), "fc.bias")
    found = class_labels(adapter, observation)
    assert found.assignment(observation).tolist() == [0, 3, 3, 9]
    assert not found.exact
    assert "guessed" in found.reason


def test_undecided_is_said():
    adapter = lenet()
    observation = observe(adapter, pixels(2), [3, 5])
    found = class_labels(adapter, without(observation, "fc.bias", "fc.weight"))
    assert found.counts is None
    assert "'fc.weight', is not released" in found.reason

    class Scaled(LeNet):
        def forward(self, x):
            return 2 * super().forward(x)

    scaled = adapt(Scaled(size=12).double())
    assert class_labels(scaled, observation).counts is None


def test_noise_makes_it_an_estimate():
    adapter = lenet()
    shared = lmleak.capture_gradient(adapter, adapter.batch(pixels(1), [4]), shared="all")
    noisy = lmleak.defenses.GaussianNoise(std=1e-4, seed=1)(shared).observation(lengths=False, labels=False)
    found = class_labels(adapter, noisy)
    assert found.assignment(noisy).tolist() == [4]
    assert not found.exact


def test_which_step_took_which_image_does_not_show():
    adapter, steps = lenet(), Aggregation(steps_per_epoch=2, learning_rate=1e-3)
    mixed = observe(adapter, pixels(2), [3, 5], aggregation=steps)
    found = class_labels(adapter, mixed)
    assert found.counts.nonzero()[:, 0].tolist() == [3, 5]
    assert found.assignment(mixed) is None
    alike = observe(adapter, pixels(2), [3, 3], aggregation=steps)
    assert class_labels(adapter, alike).assignment(alike).tolist() == [3, 3]


def test_the_last_layer_is_found_by_running_the_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_channels=1, num_labels=4,
        )  # fmt: skip
        vit = VisionAdapter(tf.ViTForImageClassification(config).eval())
    layer = last_layer(vit, seed=0)
    assert (layer.weight, layer.bias) == ("classifier.weight", "classifier.bias")
    assert layer.inputs.shape == (64, 16)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    assert last_layer(adapt(linear, image_shape=(1, 12, 12)), seed=0).weight == "1.weight"


def test_global_randomness_is_untouched():
    adapter = lenet()
    observation = observe(adapter, pixels(4), [0, 3, 3, 9])
    before = torch.get_rng_state()
    first, second = (class_labels(adapter, observation, seed=2) for _ in range(2))
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(before, torch.get_rng_state())
