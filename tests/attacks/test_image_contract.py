"""What every attack on images promises; an attack joins the suite by being registered in IMAGE_ATTACKS."""

import random
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import nn

import lmleak
from lmleak.adapters import LeNet, adapt
from lmleak.attacks import ATTACKS, IMAGE_ATTACKS, make_attack, parse_attack
from lmleak.attacks.base import Assumptions
from lmleak.defenses import DEFENSES, parse_defense
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.types import AttackCost, ImageReconstruction, Normalization, Observation

SHAPE = (1, 8, 8)
NORMALIZATION = Normalization((0.3,), (0.5,))
TASK = "image-classification"
QUICK = {"iterations": 2, "latent_iterations": 2, "weight_iterations": 1, "restarts": 2}  # promises hold at any effort
CHAIN = "clip(max_norm=1.0)+gaussian(std=0.01)+prune(ratio=0.5)"
HIDDEN = {
    "lenet": ("body.0", "fc"),
    "mlp": (r"^1", r"^3"),
    "vit": ("embeddings", "classifier"),
}  # first and last layer


def perceptron():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Sigmoid(), nn.Linear(12, 4))
    model.image_shape = SHAPE
    return model


def transformer():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(
            ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=4, hidden_act="gelu_new")
        ).eval()


MODELS = {"lenet": lambda: LeNet(size=8, num_classes=4), "mlp": perceptron, "vit": transformer}


@pytest.fixture(params=sorted(IMAGE_ATTACKS))
def name(request):
    return request.param


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A file for the attacks that look for images in the range of a decoder."""
    from lmleak.attacks.image_decoder import ImageDecoder, save_decoder

    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    save_decoder(path, ImageDecoder(SHAPE, latent_size=4, width=4), {})
    return str(path)


@pytest.fixture
def quick(name, request):
    """The attack at little effort."""
    valid = {f.name for f in fields(IMAGE_ATTACKS[name])}
    needed = {"decoder": request.getfixturevalue("decoder")} if "decoder" in valid else {}
    return make_attack(name, task=TASK, **needed, **{k: v for k, v in QUICK.items() if k in valid})


def case_for(model: str, size: int = 2):
    adapter = adapt(MODELS[model](), normalization=NORMALIZATION)
    pixels = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    batch = adapter.batch(NORMALIZATION.normalize(pixels[:size]), [2, 0][:size])
    return adapter, batch, lmleak.capture_gradient(adapter, batch, shared="all")


@pytest.fixture
def case(model):
    return case_for(model)


def assert_well_formed(recovered, name, batch):
    assert isinstance(recovered, ImageReconstruction)
    assert recovered.attack == name
    assert recovered.images.shape == batch.inputs["pixel_values"].shape
    assert recovered.images.device.type == "cpu"
    assert not recovered.images.requires_grad
    assert torch.isfinite(recovered.images).all()
    assert recovered.labels is None or recovered.labels.shape == (batch.size,)
    assert recovered.cost.seconds > 0
    assert recovered.cost.iterations > 0
    assert recovered.cost.gradient_evaluations > 0
    assert recovered.stopped


def test_names_agree_and_a_paper_is_cited(name):
    attack = IMAGE_ATTACKS[name]
    assert attack.name == name
    assert "arXiv" in attack.paper
    assert isinstance(attack.assumes, Assumptions)
    assert attack.assumes.tasks == (TASK,)
    assert not attack.assumes.lengths
    assert attack.__doc__


def test_attack_is_frozen(name):
    with pytest.raises(FrozenInstanceError):
        IMAGE_ATTACKS[name]().anything = 1


def test_the_task_decides_between_two_attacks_of_one_name():
    both = set(ATTACKS) & set(IMAGE_ATTACKS)
    assert {"dlg", "gs"} <= both
    for shared_name in both:
        assert type(make_attack(shared_name, task=TASK)) is IMAGE_ATTACKS[shared_name]
        assert type(make_attack(shared_name, task="causal-lm")) is ATTACKS[shared_name]


@pytest.mark.parametrize(
    ("model", "defense"),
    [("mlp", d) for d in (*DEFENSES, CHAIN)]
    + [(m, d) for m in ("lenet", "vit") for d in (CHAIN, "sign", "hide-layers")],
)
def test_every_defense_leaves_finite_images(name, quick, model, defense):
    adapter, batch, shared = case_for(model)
    specs = [DEFENSES[defense].example if defense in DEFENSES else defense]
    if defense == "hide-layers":
        specs = [f"hide-layers(names='{pattern}')" for pattern in HIDDEN[model]]
    for spec in specs:
        released = parse_defense(spec, seed=1)(shared)
        recovered = quick.run(adapter, released)
        assert_well_formed(recovered, name, batch)
        score = lmleak.score_images(recovered, batch, adapter, released)
        assert score.num_diverged == 0
        assert score.rmse > 0


def test_a_single_image_is_recovered_too(name, quick, model):
    # In a batch of one, the gradients of a class token and of the positions it is added to share their memory.
    adapter, batch, shared = case_for(model, size=1)
    assert_well_formed(quick.run(adapter, shared), name, batch)


def test_same_seed_same_answer_other_seed_another_and_global_randomness_untouched(quick, case):
    adapter, _, shared = case
    before = torch.get_rng_state(), random.getstate()
    first, second, other = (quick.run(adapter, shared, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.images, second.images)
    assert first.objective == second.objective
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_model_and_gradient_are_left_alone(quick, case):
    adapter, _, shared = case
    weights = {k: p.detach().clone() for k, p in adapter.model.state_dict().items()}
    trained = {k for k, p in adapter.model.named_parameters() if p.requires_grad}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())
    gradient = {k: g.clone() for k, g in shared.gradient.items()}
    quick.run(adapter, shared)
    assert all(torch.equal(p, weights[k]) for k, p in adapter.model.state_dict().items())
    for k, p in adapter.model.named_parameters():
        assert p.grad is None
        assert p.requires_grad == (k in trained)
    assert not adapter.model.training
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules())
    assert all(torch.equal(shared.gradient[k], g) for k, g in gradient.items())


def test_only_what_is_assumed_is_handed_over(name, quick, case, monkeypatch):
    adapter, batch, shared = case
    seen = []

    def spy(self, adapter, observation, *, seed):
        seen.append(observation)
        return ImageReconstruction(name, torch.zeros(2, *SHAPE), None, AttackCost(0.0), stopped="spied")

    monkeypatch.setattr(IMAGE_ATTACKS[name], "recover", spy)
    quick.run(adapter, shared)
    (observation,) = seen
    assert type(observation) is Observation
    assert observation.layout is None
    assert (observation.labels is not None) == quick.assumes.labels
    truth = batch.inputs["pixel_values"]
    held = [value for value in vars(observation).values() if isinstance(value, torch.Tensor)]
    assert not any(value.shape == truth.shape for value in (*held, *observation.gradient.values()))


def test_poisoned_truth_changes_nothing(quick, model, case):
    adapter, batch, shared = case
    honest = quick.run(adapter, shared, seed=1)
    fresh, _, _ = case_for(model)
    fresh.batch(torch.full((2, *SHAPE), 0.9), [1, 1])  # what it saw last is a lie
    told = shared if quick.assumes.labels else replace(shared, labels=torch.zeros_like(shared.labels))
    poisoned = quick.run(fresh, told, seed=1)
    assert torch.equal(poisoned.images, honest.images)
    # The same answer is scored by the truth it is given: the scorer sees it, the attacker does not.
    lie = replace(batch, inputs={"pixel_values": torch.zeros_like(batch.inputs["pixel_values"])})
    assert lmleak.score_images(poisoned, batch, adapter) == lmleak.score_images(honest, batch, adapter)
    assert lmleak.score_images(poisoned, lie, adapter) != lmleak.score_images(honest, batch, adapter)


def test_labels_are_given_inferred_or_refused(name, quick, case):
    adapter, batch, shared = case
    silent = replace(shared, labels=None)
    if quick.assumes.labels:
        with pytest.raises(UnsupportedCombinationError, match="labels are known"):
            quick.run(adapter, silent)
    if "labels" in {f.name for f in fields(quick)}:
        inferring = replace(quick, labels="inferred")
        assert not inferring.assumes.labels
        recovered = inferring.run(adapter, silent)
        assert_well_formed(recovered, name, batch)
        assert sorted(recovered.labels.tolist()) == [0, 2]


def test_refuses_what_it_does_not_work_on(quick, case):
    adapter, _, shared = case
    adapter.task = "causal-lm"
    with pytest.raises(UnsupportedCombinationError, match="works on image-classification"):
        quick.run(adapter, replace(shared, task="causal-lm"))


def test_refuses_the_gradient_of_another_model(quick, case):
    _, _, shared = case
    other = adapt(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), image_shape=SHAPE)
    with pytest.raises(DataError, match="another model"):
        quick.run(other, shared)
    with pytest.raises(DataError, match="SharedGradient"):
        quick.run(other, shared.gradient)
    for seed in (10**23, -1, 1.5):
        with pytest.raises(ConfigError, match="seed must be"):
            quick.run(other, shared, seed=seed)


def test_refuses_a_model_that_does_not_say_which_images_it_reads(quick):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    adapter = adapt(net)
    batch = adapter.batch(torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0)), [0, 1])
    with pytest.raises(lmleak.errors.UnsupportedModelError, match="which images it reads"):
        quick.run(adapter, lmleak.capture_gradient(adapter, batch, shared="all"))


def test_unknown_options_and_wrong_kinds_are_refused(name):
    first = fields(IMAGE_ATTACKS[name])[0].name
    with pytest.raises(ConfigError, match=rf"Did you mean '{first}'"):
        make_attack(name, task=TASK, **{first[:-1] + "_": 1})
    counts = [f.name for f in fields(IMAGE_ATTACKS[name]) if f.name in ("iterations", "restarts")]
    assert counts
    for option in counts:
        for bad in (0, -3, 1.5, "many"):
            with pytest.raises(ConfigError, match=option):
                make_attack(name, task=TASK, **{option: bad})
    assert parse_attack(name, task=TASK) == IMAGE_ATTACKS[name]()


def test_an_unknown_name_is_refused_with_a_suggestion(case):
    adapter, _, shared = case
    with pytest.raises(ConfigError, match="Did you mean"):
        lmleak.run_attack("dlgg", adapter, shared)
