"""What recipes on images stand on: batches, seeds, releases, rows; the same rows whoever computes them."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lmleak.adapters import LeNet
from lmleak.attacks import IMAGE_ATTACKS, make_attack
from lmleak.data.images import ImageData
from lmleak.defenses import derived_seed
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation import finish, process_state, run_items
from lmleak.evaluation.image_attack import images_of, kept_images, scored_image_attack
from lmleak.evaluation.image_study import ImageStudyConfig, attack_rows, image_study, study_folder, study_images
from lmleak.evaluation.scored import ATTACK_STREAM
from lmleak.types import AttackCost, ImageReconstruction, Normalization
from tests.launching import fork

DEFENSES = ("none", "gaussian(std=0.1, unit=rms)")
ATTACKS = ("dlg(iterations=2)", "gs(iterations=2)")


def test_an_empty_split_is_none():
    config = ImageStudyConfig(data="digits", split="")
    assert len(study_images(config)) == 1797
    with pytest.raises(ConfigError, match="no splits"):
        study_images(replace(config, split="test"))


def squares(count=6, size=8):
    """Images that differ, of two classes."""
    pixels = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))
    return ImageData(pixels, torch.arange(count) % 2, ("even", "odd"), "squares")


def study_of(tmp_path=None, model="lenet", data=None, **settings):
    config = ImageStudyConfig(samples=2, batch_size=2, device="cpu", output=str(tmp_path or "runs/x"), **settings)
    return config, image_study(config, model, data or squares(), process_state())


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in rows]


def test_an_architecture_is_made_for_the_data_and_its_normalisation():
    data = squares()
    _, study = study_of(data=data)
    assert study.adapter.image_shape == (1, 8, 8)
    assert study.adapter.normalization == data.normalization()
    assert study.adapter.name == "lenet"
    batch = study.batch(1)
    torch.testing.assert_close(study.adapter.normalization.pixels(batch.inputs["pixel_values"]), data.pixels[2:4])
    assert batch.targets.tolist() == [0, 1]
    assert study.adapter.logits(batch.inputs["pixel_values"]).shape == (2, 2)


def test_settings_name_the_data_and_how_it_is_normalised():
    config = ImageStudyConfig(image_size=12, normalization="none", device="cpu")
    data = study_images(config)
    assert data.image_shape == (1, 12, 12)
    study = image_study(config, "linear", data, process_state())
    assert torch.equal(study.batch(3).inputs["pixel_values"], data.pixels[3:4])
    assert image_study(
        replace(config, normalization="mnist"), "linear", data, process_state()
    ).adapter.normalization == Normalization((0.1307,), (0.3081,))


def test_a_model_in_memory_is_copied_and_keeps_its_own_normalisation():
    model = LeNet(size=8, num_classes=2)
    model.normalization = Normalization((0.5,), (0.25,))
    _, study = study_of(model=model, precision="float64")
    assert study.adapter.normalization == model.normalization
    assert study.adapter.name == "LeNet"
    assert study.adapter.dtype == study.batch(0).inputs["pixel_values"].dtype == torch.float64
    assert next(model.parameters()).dtype == torch.float32
    weights = study.adapter.model.state_dict()
    assert all(torch.equal(value.double(), weights[key]) for key, value in model.state_dict().items())


def test_weights_follow_the_seed_and_the_initialisation():
    config, first = study_of()
    others = [
        image_study(config, "lenet", squares(), process_state()),
        image_study(replace(config, seed=1), "lenet", squares(), process_state()),
        image_study(config, "lenet", squares(), process_state(), initialization="xavier"),
    ]
    digests = [study.identity()["weights"] for study in (first, *others)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    with pytest.raises(ConfigError, match="has some"):
        image_study(config, nn.Linear(2, 2), squares(), process_state(), initialization="normal")


def test_noise_depends_on_seed_and_sample_alone():
    _, study = study_of()
    noise = study.release(0, DEFENSES[1]).perturbation["fc.bias"]
    assert torch.equal(noise, study.release(0, DEFENSES[1]).perturbation["fc.bias"])
    assert not torch.equal(noise, study.release(1, DEFENSES[1]).perturbation["fc.bias"])
    doubled = study.release(0, "gaussian(std=0.2, unit=rms)").perturbation["fc.bias"]
    torch.testing.assert_close(doubled, 2 * noise, rtol=1e-4, atol=1e-7)  # levels compare in pairs
    assert not any(delta.any() for delta in study.release(0).perturbation.values())


def test_the_attack_gets_a_seed_of_its_own_and_the_row_holds_its_scores(monkeypatch):
    _, study = study_of()
    batch, shared = study.batch(0), study.release(0).shared
    seeds = []

    def spy(self, adapter, observation, *, seed):
        seeds.append(seed)
        images = batch.inputs["pixel_values"][[1, 0]] + 0.1
        return ImageReconstruction(
            "gs", images, batch.targets[[1, 0]], AttackCost(0.0, 6, 3), "spied", float("nan"), ("n",)
        )

    monkeypatch.setattr(IMAGE_ATTACKS["gs"], "recover", spy)
    attack = make_attack("gs", task="image-classification")
    row = scored_image_attack(attack, study.adapter, shared, batch, seed=7, keep_images=True)
    assert seeds == [derived_seed(7, ATTACK_STREAM)] != [7]
    assert row["rmse"] == pytest.approx(0.1, rel=1e-5)
    assert row["label_accuracy"] == 1
    assert row["matching_loss"] > 0
    assert row["objective"] is None
    assert (row["iterations"], row["gradient_evaluations"]) == (3, 6)
    assert row["stopped"] == "spied"
    assert row["notes"] == ["n"]
    assert [example["prediction"] for example in row["per_example"]] == [1, 0]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    shown = images_of(row, squares().pixels[:2])
    expected = study.adapter.normalization.pixels(batch.inputs["pixel_values"] + 0.1)
    torch.testing.assert_close(shown, expected.double(), rtol=0, atol=1e-7)  # in the batch's order


def test_an_impossible_combination_is_refused_in_words():
    _, study = study_of()
    shared = replace(study.release(0).shared, labels=None)
    attack = make_attack("gs", task="image-classification")
    row = scored_image_attack(attack, study.adapter, shared, study.batch(0), seed=0)
    assert list(row) == ["refused"]
    assert "labels" in row["refused"]


def test_a_diverged_image_survives_the_file():
    pixels = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0, 0] = float("inf")
    kept = json.loads(json.dumps(kept_images(pixels), allow_nan=False))
    assert kept[0] is None
    back = images_of({"images": kept}, pixels)
    assert torch.isnan(back[0]).all()
    torch.testing.assert_close(back[1], pixels[1].double(), rtol=0, atol=1e-7)


def test_rows_are_flat_keyed_and_the_same_for_whoever_computes_them():
    calls = []

    def measure(batch, release):
        calls.append(release.shared.defenses)
        return {"risk": float(batch.size)}

    def rows():
        _, study = study_of()
        options = {"defenses": DEFENSES, "attacks": ATTACKS, "common": {"model": "lenet"}, "measure": measure}
        return [row for sample in (0, 1) for row in attack_rows(study, sample, **options)]

    first = rows()
    assert len(calls) == 4  # once per sample and defense
    assert [row["key"] for row in first[:2]] == [f"lenet|0|none|{attack}" for attack in ATTACKS]
    assert len({row["key"] for row in first}) == len(first) == 8
    assert first[0]["model"] == "lenet"
    assert first[0]["perturbation_rms"] == 0
    assert first[2]["perturbation_rms"] == pytest.approx(0.1 * first[0]["released_rms"], rel=0.05)
    assert first[4]["indices"] == [2, 3]
    assert first[4]["labels"] == [0, 1]
    assert all(row["risk"] == 2 and row["rmse"] > 0 for row in first)
    json.dumps(first, allow_nan=False)
    assert untimed(rows()) == untimed(first)


def test_bad_input_is_refused_before_any_work():
    with pytest.raises(DataError, match=r"squares holds 3 image\(s\).*need 4"):
        study_of(data=squares(3))
    for wrong in ({"samples": 0}, {"batch_size": 0}, {"precision": "half"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ImageStudyConfig(**wrong)
    _, study = study_of()
    study.check(DEFENSES, ATTACKS)
    with pytest.raises(ConfigError, match="Did you mean"):
        study.check(["gausian(std=1)"], ATTACKS)
    with pytest.raises(ConfigError, match="Did you mean"):
        study.check(DEFENSES, ["dlgg"])
    with pytest.raises(ConfigError, match="matches none"):
        study.check(["hide-layers(names='nothing')"], ATTACKS)
    with pytest.raises(DataError, match="cannot read pixels"):
        study_of(model=LeNet(size=12, num_classes=2))[1].check((), ())


def test_a_finished_run_is_not_computed_again_and_other_inputs_are_refused(tmp_path):
    config, study = study_of(tmp_path / "out")
    worked = []

    def work(number, sample):
        worked.append(number)
        return attack_rows(study, sample, defenses=["none"], attacks=ATTACKS[:1])

    state = process_state()
    first = run_items([0, 1], work, study_folder(config, {"lenet": study}), state, label="x")
    again = run_items([0, 1], work, study_folder(config, {"lenet": study}), state, label="x")
    assert worked == [0, 1]
    assert again == json.loads(json.dumps(first))
    _, other = study_of(tmp_path / "out", data=replace(squares(), pixels=squares().pixels.flip(0)))
    with pytest.raises(ConfigError, match="lenet images"):
        run_items([0, 1], work, study_folder(config, {"lenet": other}), state, label="x")
    with pytest.raises(ConfigError, match="seed"):
        run_items([0, 1], work, study_folder(replace(config, seed=5), {"lenet": study}), state, label="x")


def small_run(folder):
    config = ImageStudyConfig(samples=3, batch_size=2, device="cpu", output=str(folder))
    state = process_state()
    study = image_study(config, "lenet", squares(), state)
    work = lambda number, sample: attack_rows(
        study, sample, defenses=["gaussian(std=0.1, unit=rms)"], attacks=["gs(iterations=3)"], keep_images=True
    )
    run_items(range(3), work, study_folder(config, {"lenet": study}), state, label="attacking")
    finish(state)


@pytest.mark.multiprocess
def test_two_processes_give_the_rows_of_one(tmp_path):
    fork(small_run, tmp_path / "two")
    small_run(tmp_path / "one")
    assert len(list((tmp_path / "two" / "shards").glob("rank-*.jsonl"))) == 2
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    assert untimed(two) == untimed(one)
