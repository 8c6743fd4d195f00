"""Every registered defense keeps the same contract; a new entry of DEFENSES is checked without a new test."""

import dataclasses

import pytest
import torch

from lmleak.defenses import DEFENSES, Chain, Defense, parse_defense

CHAIN = "clip(max_norm=1.0)+gaussian(std=0.1, unit=rms)+quantize(bits=6)+hide-layers(names='embeddings')"
EXAMPLES = {name: kind.example for name, kind in DEFENSES.items()} | {
    "chain": CHAIN,
    "bf16 to nearest": "bf16",
    "topk of k": "topk(k=17)",
    "sign unscaled": "sign(scale=none)",
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

every_defense = pytest.mark.parametrize("spec", EXAMPLES.values(), ids=EXAMPLES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_names_and_examples_are_those_of_the_table():
    for name, kind in DEFENSES.items():
        assert kind.name == name
        assert type(parse_defense(kind.example)) is kind
        assert dataclasses.is_dataclass(kind)
        assert issubclass(kind, Defense)
        assert isinstance(kind.paper, str)
        assert kind.__doc__


@every_defense
def test_defense_is_frozen(spec):
    defense = parse_defense(spec)
    with pytest.raises(dataclasses.FrozenInstanceError):
        defense.anything = 1
    assert hash(defense) == hash(parse_defense(spec))


@every_defense
@every_dtype
def test_input_is_untouched_and_not_shared_with_the_result(spec, dtype, make_shared):
    shared, before = make_shared(dtype), make_shared(dtype)
    released = parse_defense(spec)(shared)
    assert_same(shared.gradient, before.gradient)
    assert shared.defenses == before.defenses
    storages = {tensor.data_ptr() for tensor in shared.gradient.values()}
    assert storages.isdisjoint(tensor.data_ptr() for tensor in released.gradient.values())


@every_defense
@every_dtype
def test_shape_dtype_and_device_are_kept(spec, dtype, make_shared):
    shared = make_shared(dtype)
    released = parse_defense(spec)(shared)
    assert set(released.gradient) <= set(shared.gradient)
    if "hide-layers" not in spec:
        assert list(released.gradient) == list(shared.gradient)
    for name, tensor in released.gradient.items():
        true = shared.gradient[name]
        assert (tensor.shape, tensor.dtype, tensor.device) == (true.shape, true.dtype, true.device)
        assert not tensor.requires_grad


@every_defense
def test_same_seed_same_result(spec, make_shared):
    shared = make_shared()
    assert_same(parse_defense(spec, seed=3)(shared).gradient, parse_defense(spec, seed=3)(shared).gradient)
    defense = parse_defense(spec, seed=3)
    assert_same(defense(shared).gradient, defense(shared).gradient)


@every_defense
def test_seeds_differ_exactly_if_random(spec, make_shared):
    shared = make_shared()
    first, second = (parse_defense(spec, seed=seed)(shared).gradient for seed in (3, 4))
    differs = any(not torch.equal(first[name], second[name]) for name in first)
    assert differs == parse_defense(spec).random
    assert parse_defense(spec, seed=3).with_seed(4) == parse_defense(spec, seed=4)


@every_defense
def test_result_does_not_depend_on_dictionary_order(spec, make_shared):
    shared = make_shared()
    backwards = dataclasses.replace(shared, gradient=dict(reversed(shared.gradient.items())))
    defense = parse_defense(spec, seed=3)
    result, reordered = defense(shared).gradient, defense(backwards).gradient
    assert list(reordered) == list(result)[::-1]
    for name in result:
        assert torch.equal(result[name], reordered[name]), name


@every_defense
def test_global_random_state_is_untouched(spec, make_shared):
    shared = make_shared()
    state = torch.get_rng_state()
    parse_defense(spec).release(shared)
    assert torch.equal(torch.get_rng_state(), state)


@every_defense
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_true_gradient_plus_perturbation_is_released(spec, dtype, make_shared):
    shared = make_shared(dtype)
    release = parse_defense(spec, seed=3).release(shared)
    assert_same(release.shared.gradient, parse_defense(spec, seed=3)(shared).gradient)
    assert set(release.perturbation) == set(release.shared.gradient)
    for name, delta in release.perturbation.items():
        released, true = release.shared.gradient[name], shared.gradient[name]
        assert torch.equal(delta, released - true)
        # fl(true + fl(released - true)) is exact up to the rounding of the difference and of the sum
        bound = torch.finfo(dtype).eps * (released.abs() + delta.abs())
        assert ((true + delta - released).abs() <= bound).all()
        withdrawn = released == 0  # where a coordinate is dropped, the sum is exact
        assert torch.equal((true + delta)[withdrawn], released[withdrawn])


@every_defense
def test_public_facts_are_kept_and_the_defense_is_recorded(spec, make_shared):
    shared = make_shared()
    defense = parse_defense(spec)
    released = defense(shared)
    for fact in ("task", "batch_size", "model", "shared"):
        assert getattr(released, fact) == getattr(shared, fact)
    assert_same(released.layout, shared.layout)
    assert torch.equal(released.labels, shared.labels)
    assert released.defenses[:1] == shared.defenses
    assert "+".join(released.defenses[1:]) == defense.describe()
    assert len(released.defenses) == 1 + (len(defense.parts) if isinstance(defense, Chain) else 1)


@every_defense
def test_description_hides_the_seed_and_parses_back(spec):
    seed = 918273645
    defense = parse_defense(spec, seed=seed)
    public = defense.describe()
    assert str(defense) == public
    assert "seed" not in public + repr(defense)
    assert str(seed) not in public + repr(defense)
    assert parse_defense(public, seed=seed) == defense
    assert parse_defense(public).describe() == public


@every_defense
@every_dtype
def test_zero_gradient_stays_finite(spec, dtype, make_shared):
    released = parse_defense(spec)(make_shared(dtype, zero=True))
    for name, tensor in released.gradient.items():
        assert torch.isfinite(tensor).all(), name
        assert not tensor.any(), name  # every example is relative to the gradient's size, or scales it


@every_defense
def test_empty_parameter_passes_through(spec, make_shared):
    shared = make_shared()
    extended = dataclasses.replace(shared, gradient={**shared.gradient, "encoder.2.bias": torch.zeros(0).double()})
    released = parse_defense(spec)(extended).gradient
    assert released["encoder.2.bias"].shape == (0,)
    if "topk(fraction" not in spec and "prune" not in spec:
        expected = parse_defense(spec)(shared).gradient
        assert all(torch.equal(released[name], expected[name]) for name in expected)


@every_defense
def test_gradient_that_still_carries_a_graph_is_released_without_it(spec, make_shared):
    shared = make_shared()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in shared.gradient.items()}
    released = parse_defense(spec, seed=3)(dataclasses.replace(shared, gradient=leaves))
    assert not any(tensor.requires_grad for tensor in released.gradient.values())
    assert_same(released.gradient, parse_defense(spec, seed=3)(shared).gradient)
    assert all(tensor.requires_grad for tensor in leaves.values())


@every_defense
def test_released_gradient_survives_the_file(spec, make_shared, tmp_path):
    released = parse_defense(spec)(make_shared(torch.float32))
    path = released.save(tmp_path / "gradient.safetensors")
    loaded = type(released).load(path)
    assert loaded.defenses == released.defenses
    assert all(torch.equal(loaded.gradient[name], tensor) for name, tensor in released.gradient.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_defense
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gpu_releases_what_the_cpu_releases(spec, dtype, make_shared):
    shared = make_shared(dtype)
    moved = dataclasses.replace(shared, gradient={name: t.cuda() for name, t in shared.gradient.items()})
    expected, released = parse_defense(spec, seed=3)(shared).gradient, parse_defense(spec, seed=3)(moved).gradient
    for name, tensor in released.items():
        assert tensor.is_cuda
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=4 * torch.finfo(dtype).eps, atol=0)
