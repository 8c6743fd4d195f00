"""The convolutional decoder and the attack as members: where they help, and that they tell nothing of nothing."""

import numpy as np
import pytest
import torch

from lmleak.errors import ConfigError, DataError
from lmleak.leakage.families_attack import attack_information
from lmleak.leakage.families_decoder import ConvolutionalDecoder, fit_decoder
from lmleak.leakage.vinformation import v_information


def blobs(n, size=8, seed=0):
    """Images (n, 1, size, size) of one bright blob, and features that tell where it is, (n, 2)."""
    where = np.random.default_rng(seed).uniform(1, size - 2, (n, 2))
    axis = np.arange(size)
    spread = lambda centre: np.exp(-((axis - centre[:, None]) ** 2))
    images = spread(where[:, 0])[:, :, None] * spread(where[:, 1])[:, None, :]
    return where, images[:, None]


def test_a_decoder_draws_what_no_linear_map_can():
    features, images = blobs(360)
    train, new = slice(0, 300), slice(300, 360)
    truth = images[new].reshape(60, -1)
    drawn = fit_decoder(features[train], images[train].reshape(300, -1), 0, image_shape=(1, 8, 8))(features[new])
    design = np.c_[features, np.ones(360)]
    linear = design[new] @ np.linalg.lstsq(design[train], images[train].reshape(300, -1), rcond=None)[0]
    constant = np.square(truth - images[train].reshape(300, -1).mean(0)).mean()
    assert np.square(truth - linear).mean() > 0.5 * constant
    assert np.square(truth - drawn).mean() < 0.1 * constant


def test_the_family_with_a_decoder_is_chosen_where_it_is_best_and_holds_the_smaller_ones():
    features, images = blobs(160)
    linear = v_information(features, images, folds=2)
    largest = v_information(features, images, family="conv-decoder", folds=2)
    assert largest.low > linear.high
    assert largest.num_coordinates == 64
    flat = v_information(features, images.reshape(160, -1), folds=2)
    assert flat.nats == linear.nats  # an image is its pixels to every other family


def test_independent_features_tell_the_decoder_nothing():
    _, images = blobs(200)
    noise = np.random.default_rng(7).standard_normal((200, 5))
    found = v_information(noise, images, family="conv-decoder", folds=2)
    assert found.low <= 0.0 < found.high + 1e-9
    assert abs(found.r_squared) < 0.02


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 14)])
def test_images_of_any_size_are_drawn(shape):
    assert ConvolutionalDecoder(5, shape)(torch.zeros(2, 5)).shape == (2, *shape)


def test_the_seed_decides_and_nothing_global_is_drawn():
    features, images = blobs(60)
    flat, before = images.reshape(60, -1), torch.get_rng_state()
    first, again, other = (fit_decoder(features, flat, s, image_shape=(1, 8, 8))(features[:3]) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_decoder_needs_images():
    with pytest.raises(ConfigError, match="draws images"):
        v_information(np.zeros((40, 2)), np.random.default_rng(0).standard_normal((40, 3)), family="conv-decoder")
    with pytest.raises(ConfigError, match="draws images"):
        v_information(np.zeros((40, 2)), np.arange(40) % 2, family="conv-decoder")


def noisy_attack(n=400, dx=6, noise=0.5, seed=0):
    """An attack whose output is the input plus noise of independent coordinates; inputs are N(0, 1)."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, dx))
    return x + noise * generator.standard_normal((n, dx)), x


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_an_attack_with_gaussian_errors_is_worth_the_channels_capacity(noise):
    """y = x + N(0, s^2), x ~ N(0, 1): I = dx/2 log(1 + 1/s^2), reached with trust a = 1 / (1 + s^2)."""
    recovered, x = noisy_attack(2000, noise=noise)
    found = attack_information(recovered, x)
    exact = 6 / 2 * np.log(1 + 1 / noise**2)
    assert found.low < exact < found.high
    assert found.high - found.low < 0.2 * exact + 0.15
    assert set(found.members) == {"attack"}


def test_a_failing_attack_tells_nothing_and_harms_nothing():
    recovered, x = noisy_attack(noise=0.2)
    wrong = np.random.default_rng(3).permutation(recovered)
    found = attack_information(100 * wrong, x)
    assert found.low <= 1e-9
    assert abs(found.r_squared) < 0.02
    alone = v_information(recovered[:, :3], x)
    joined = attack_information(100 * wrong, x, features=recovered[:, :3], family="linear")
    assert joined.nats == pytest.approx(alone.nats, rel=0.02)
    assert attack_information(recovered, x, features=recovered[:, :3], family="linear").nats > alone.high


def test_attacks_that_cannot_be_judged_are_refused():
    recovered, x = noisy_attack(40)
    with pytest.raises(DataError, match="one reconstruction per input"):
        attack_information(recovered[:, :2], x)
    with pytest.raises(DataError, match="labels"):
        attack_information(recovered, np.arange(40) % 2)
    with pytest.raises(ConfigError, match="needs features"):
        attack_information(recovered, x, family="linear")
