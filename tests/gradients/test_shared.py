"""The shared gradient in memory and as a file."""

import json
from dataclasses import fields, replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lmleak.adapters import adapt
from lmleak.defenses import GaussianNoise
from lmleak.errors import ConfigError, DataError, UnsupportedModelError
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.types import Observation
from tests.families import LABELS, SEQUENCES, build, make


@pytest.fixture
def shared():
    """A classifier's gradient with lengths, labels and a random defense."""
    adapter, batch = make("bert")
    return GaussianNoise(std=1e-3, seed=987654321)(capture_gradient(adapter, batch, shared="all"))


@pytest.fixture
def saved(shared, tmp_path):
    return shared.save(tmp_path / "gradient.safetensors")


def test_a_round_trip_is_bitwise(shared, saved):
    loaded = SharedGradient.load(saved)
    assert list(loaded.gradient) == sorted(shared.gradient)
    for name, tensor in shared.gradient.items():
        assert torch.equal(loaded.gradient[name], tensor)
        assert loaded.gradient[name].dtype == tensor.dtype
    assert loaded.layout.keys() == shared.layout.keys()
    assert all(torch.equal(loaded.layout[key], shared.layout[key]) for key in shared.layout)
    assert torch.equal(loaded.labels, shared.labels)
    for name in ("task", "batch_size", "model", "shared", "defenses"):
        assert getattr(loaded, name) == getattr(shared, name), name
    assert loaded.rms == shared.rms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_every_released_dtype_survives(dtype, tmp_path):
    gradient = {"w": torch.tensor([[1.0, -2.5], [3.0, 0.0]]).to(dtype), "scalar": torch.tensor(4.0).to(dtype)}
    loaded = SharedGradient.load(SharedGradient(gradient, "causal-lm", 1).save(tmp_path / "g"))
    assert all(torch.equal(loaded.gradient[n], t) and loaded.gradient[n].dtype == dtype for n, t in gradient.items())
    assert loaded.labels is None
    assert loaded.layout == {}


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm"])
def test_nothing_private_is_written(name, tmp_path):
    """Neither texts nor token ids nor token targets nor the seed of the noise, in the header or as tensors."""
    adapter, batch = make(name)
    released = GaussianNoise(std=1e-3, seed=987654321)(capture_gradient(adapter, batch))
    path = released.save(tmp_path / "g.safetensors")
    with safe_open(path, framework="pt") as file:
        header, names = file.metadata(), list(file.keys())
    assert set(header) == {
        "format", "version", "model", "weights", "task", "shared", "batch_size", "reduction", "defenses",
    }  # fmt: skip
    assert "987654321" not in json.dumps(header)
    assert "seed" not in json.dumps(header)
    assert all(text not in json.dumps(header) for text in batch.texts)
    assert {n for n in names if not n.startswith("gradient/")} <= {"layout/attention_mask", "layout/token_type_ids"}
    assert header["reduction"] == "mean"


def test_what_is_not_revealed_is_not_written(tmp_path):
    adapter, batch = make("bert")
    hidden = capture_gradient(adapter, batch, reveal_lengths=False, reveal_labels=False)
    assert hidden.labels is None
    assert not hidden.layout
    with safe_open(hidden.save(tmp_path / "g"), framework="pt") as file:
        assert all(name.startswith("gradient/") for name in file.keys())  # noqa: SIM118
    assert capture_gradient(adapter, batch).labels is not None


def test_views_and_transposes_are_written(tmp_path):
    """Gradients are often views of one flat buffer."""
    flat = torch.arange(10.0)
    gradient = {"a": flat[:6].view(2, 3), "b": flat[6:].view(2, 2).T, "c": torch.tensor(2.0)}
    loaded = SharedGradient.load(SharedGradient(gradient, "causal-lm", 1).save(tmp_path / "g"))
    assert all(torch.equal(loaded.gradient[n], t) for n, t in gradient.items())


def test_saving_replaces_the_old_file_and_makes_folders(shared, tmp_path):
    path = tmp_path / "deep" / "er" / "g.safetensors"
    shared.save(path)
    other = replace(shared, model="other")
    assert other.save(str(path)) == path
    assert SharedGradient.load(path).model == "other"
    assert [p.name for p in path.parent.iterdir()] == ["g.safetensors"]


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_failed_save_leaves_no_file_and_keeps_the_old_one(shared, tmp_path, monkeypatch, error):
    path = shared.save(tmp_path / "g.safetensors")
    content = path.read_bytes()

    def fail(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise error("disk full")

    monkeypatch.setattr("lmleak.files.save_file", fail)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(ConfigError, match=f"cannot write {target}: disk full"):
            shared.save(target)
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]
    assert path.read_bytes() == content


def test_saving_over_a_folder_fails_cleanly(shared, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*folder: Is a directory"):
        shared.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def rewrite(path, tensors=None, drop=(), **header):
    """Write a gradient file again with some of its header or tensors changed."""
    with safe_open(path, framework="pt") as file:
        old_header = file.metadata()
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    merged = {k: v for k, v in (old_header | header).items() if k not in drop}
    save_file(old if tensors is None else tensors, path, metadata=merged)
    return path


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -1000])
def test_a_truncated_file_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        SharedGradient.load(saved)


@pytest.mark.parametrize("content", [b"hello", b"\xff" * 64, b"\x00" * 64, b"PK\x03\x04" + b"\x00" * 40])
def test_bytes_of_something_else_are_refused(tmp_path, content):
    path = tmp_path / "g"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        SharedGradient.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match="no gradient file at"):
            SharedGradient.load(path)


@pytest.mark.parametrize("header", [{"format": "other"}, {"version": "2"}, {"version": "0"}])
def test_another_format_or_version_is_refused(saved, header):
    with pytest.raises(DataError, match="expected 'lmleak-gradient', '1'"):
        SharedGradient.load(rewrite(saved, **header))


def test_a_plain_weight_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(DataError, match="format=None"):
        SharedGradient.load(path)


@pytest.mark.parametrize("key", ["task", "batch_size", "shared", "defenses"])
def test_a_missing_header_field_is_refused(saved, key):
    with pytest.raises(DataError, match=f"lacks {key}"):
        SharedGradient.load(rewrite(saved, drop=(key,)))


@pytest.mark.parametrize(
    "header",
    [{"batch_size": "three"}, {"batch_size": "0"}, {"batch_size": "-1"}, {"batch_size": "2.0"},
     {"defenses": "[unclosed"}, {"defenses": "5"}, {"defenses": "null"}, {"defenses": '"gaussian"'},
     {"defenses": "[1, 2]"}],
)  # fmt: skip
def test_a_damaged_header_is_refused(saved, header):
    with pytest.raises(DataError, match="is damaged"):
        SharedGradient.load(rewrite(saved, **header))


def test_a_file_without_a_gradient_is_refused(saved):
    with pytest.raises(DataError, match="at least one tensor"):
        SharedGradient.load(rewrite(saved, tensors={"labels": torch.tensor([1])}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(shared, saved, value):
    name = next(iter(shared.gradient))
    broken = {n: t.clone() for n, t in shared.gradient.items()}
    broken[name].view(-1)[-1] = value
    with pytest.raises(DataError, match=f"{name!r} holds NaN or Inf"):
        replace(shared, gradient=broken)
    with pytest.raises(DataError, match="holds NaN or Inf"):
        SharedGradient.load(rewrite(saved, tensors={f"gradient/{n}": t for n, t in broken.items()}))


def test_logits_that_are_not_finite_are_refused():
    task, model = build("bert")
    with torch.no_grad():  # finite weights, and sums that overflow
        model.classifier.weight.fill_(1.7e308)
        model.classifier.bias.fill_(1.7e308)
    with pytest.raises(UnsupportedModelError, match="NaN or Inf"):
        adapt(model, task=task).batch(SEQUENCES, LABELS)
    shrunk = adapt(build("bert")[1])
    batch = shrunk.batch(SEQUENCES, LABELS)
    with torch.no_grad():  # the weights diverge after the batch was made
        shrunk.model.classifier.weight.fill_(1.7e308)
    with pytest.raises(DataError, match="NaN or Inf"):
        capture_gradient(shrunk, batch)


class TestCheck:
    def test_the_model_that_made_it_passes(self, saved):
        assert SharedGradient.load(saved, make("bert")[0]).task == "sequence-classification"

    def test_a_part_of_the_parameters_passes(self, tmp_path):
        adapter, batch = make("bert")
        path = capture_gradient(adapter, batch, shared="head").save(tmp_path / "g")
        assert len(SharedGradient.load(path, adapter).gradient) == len(adapter.select("head").names)

    def test_another_task_is_refused(self, saved):
        with pytest.raises(DataError, match="of task 'sequence-classification', the model of 'causal-lm'"):
            SharedGradient.load(saved, make("gpt2")[0])

    def test_another_family_is_refused(self, saved):
        with pytest.raises(DataError, match=r"names .* the model lacks, first 'bert"):
            SharedGradient.load(saved, make("roberta")[0])

    def test_another_width_is_refused(self, shared, saved):
        name = "classifier.weight"
        wider = {f"gradient/{n}": (torch.ones(3, 17) if n == name else t) for n, t in shared.gradient.items()}
        with pytest.raises(
            DataError, match=r"'classifier.weight' has shape \(3, 17\), the model's parameter \(3, 16\)"
        ):
            SharedGradient.load(rewrite(saved, tensors=wider), make("bert")[0])

    def test_a_parameter_that_is_not_trained_is_refused(self, saved):
        _, model = build("bert")
        model.bert.embeddings.requires_grad_(False)
        with pytest.raises(DataError, match="the model lacks"):
            SharedGradient.load(saved, adapt(model))


class TestObservation:
    def test_it_has_no_field_for_the_truth(self):
        assert {f.name for f in fields(Observation)} == {
            "gradient", "task", "batch_size", "shared", "aggregation", "defenses", "layout", "labels",
        }  # fmt: skip

    @pytest.mark.parametrize("lengths", [True, False])
    @pytest.mark.parametrize("labels", [True, False])
    def test_lengths_and_labels_only_if_assumed(self, shared, lengths, labels):
        seen = shared.observation(lengths=lengths, labels=labels)
        assert (seen.layout is not None) is lengths
        assert (seen.labels is not None) is labels
        assert seen.gradient.keys() == shared.gradient.keys()
        assert seen.defenses == shared.defenses
        assert "987654321" not in repr(seen.defenses)

    def test_what_was_not_revealed_stays_unknown(self):
        adapter, batch = make("bert")
        hidden = capture_gradient(adapter, batch, reveal_lengths=False, reveal_labels=False)
        seen = hidden.observation(lengths=True, labels=True)
        assert seen.layout is None
        assert seen.labels is None

    def test_token_targets_are_never_labels(self):
        for name in ("gpt2", "bert-mlm"):
            adapter, batch = make(name)
            assert capture_gradient(adapter, batch).labels is None

    def test_it_cannot_be_changed_into_the_client_s_dictionary(self, shared):
        seen = shared.observation(lengths=True, labels=True)
        seen.gradient.clear()
        seen.layout.clear()
        assert shared.gradient
        assert shared.layout


def test_perturbation_is_released_minus_true():
    adapter, batch = make("bert")
    true = capture_gradient(adapter, batch)
    noisy = GaussianNoise(std=0.5, seed=3)(true)
    delta = noisy.perturbation_from(true)
    assert all(torch.equal(delta[n], noisy.gradient[n] - true.gradient[n]) for n in true.gradient)
    kept = list(true.gradient)[3:5]
    partial = true.released({n: true.gradient[n] for n in kept}, "hide")
    assert list(partial.perturbation_from(true)) == kept
    assert partial.defenses == ("hide",)
    assert true.defenses == ()


def test_units():
    shared = SharedGradient({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0], [0.0]])}, "causal-lm", 2)
    assert shared.num_coordinates == 4
    assert shared.rms == pytest.approx(2.5)


def test_gradient_of_other_weights_is_refused(tmp_path):
    adapter, batch = make("gpt2")
    shared = SharedGradient.load(capture_gradient(adapter, batch).save(tmp_path / "g"), adapter)
    with torch.no_grad():
        for p in adapter.model.parameters():  # one training step later
            p.sub_(1e-3)
    with pytest.raises(DataError, match="another training step"):
        shared.check(adapter)
    replace(shared, weights="").check(adapter)  # an exporter who left it out vouches for it


def test_gradient_of_a_model_tied_otherwise_is_refused():
    tied, batch = make("gpt2")
    untied, other = make("gpt2-untied")
    with pytest.raises(DataError, match="leaves out of this model"):
        capture_gradient(tied, batch).check(untied)
    whole = capture_gradient(untied, other)
    whole.check(untied)
    incomplete = whole.released(dict(list(whole.gradient.items())[1:]), "none")
    with pytest.raises(DataError, match=r"lacks 1 parameter\(s\)"):
        incomplete.check(untied)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"layout": {"attention_mask": torch.ones(2, 4)}}, "expected integers"),
        ({"layout": {"attention_mask": torch.ones(4, dtype=torch.long)}}, "expected integers"),
        ({"layout": {"attention_mask": torch.ones(5, 4, dtype=torch.long)}}, "batch_size 2"),
        ({"layout": {"attention_mask": torch.zeros(2, 4, dtype=torch.long)}}, "token in every row"),
        ({"layout": {"attention_mask": torch.full((2, 4), 3)}}, "1 at tokens"),
        ({"layout": {"evil": torch.ones(2, 4, dtype=torch.long)}}, "unknown layout"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "2 integers"),
        ({"labels": torch.zeros(2)}, "2 integers"),
        ({"batch_size": 10**8}, "batch_size is"),
        ({"gradient": {"w": torch.zeros(2, 2, dtype=torch.complex64)}}, "complex64"),
        ({"gradient": {"w": torch.zeros(2, 2, dtype=torch.bool)}}, "bool"),
    ],
)
def test_public_facts_that_no_batch_has_are_refused(wrong, reason):
    right = {"gradient": {"w": torch.ones(2, 2)}, "task": "causal-lm", "batch_size": 2}
    SharedGradient(**right)
    with pytest.raises(DataError, match=reason):
        SharedGradient(**right | wrong)


def test_public_facts_that_the_model_cannot_have_are_refused():
    adapter, batch = make("bert", size=2)
    shared = capture_gradient(adapter, batch)
    with pytest.raises(DataError, match="out of range"):
        replace(shared, labels=torch.tensor([0, 99])).check(adapter)
    with pytest.raises(DataError, match="70 positions"):
        replace(shared, layout={"attention_mask": torch.ones(2, 70, dtype=torch.long)}).check(adapter)


def test_integers_are_attacked_as_the_numbers_they_are():
    adapter, batch = make("gpt2", size=2)
    shared = capture_gradient(adapter, batch)
    rounded = replace(shared, gradient={n: (1e3 * g).round().to(torch.int32) for n, g in shared.gradient.items()})
    seen = rounded.observation(lengths=True, labels=False)
    assert all(g.is_floating_point() for g in seen.gradient.values())
