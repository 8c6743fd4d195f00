"""capture, attack and score of images: from private images to a file, from it alone to images, how right they are."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lmleak
from lmleak.cli import REFUSED, main
from lmleak.data import load_images
from lmleak.evaluation.image_records import FORMAT, read_images
from lmleak.types import Normalization

SHAPE = "architecture: lenet\nimage_shape: [1, 8, 8]\nnormalization: mnist\n"
REFERENCE = "gradient.private-reference.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own with the model's shape: a LeNet of the digits' own 8x8 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "lenet8.yaml").write_text(SHAPE)
    return tmp_path


def capture(*options, model="lenet8.yaml", size="2"):
    return main(["capture", "--model", model, "--batch-size", size, "--device", "cpu", *options])


def attack(*options, model="lenet8.yaml"):
    return main(["attack", "gradient.safetensors", "--model", model, "--device", "cpu", *options])


def score(*options):
    return main(["score", "recovered.safetensors", REFERENCE, *options])


def refusal(capsys):
    error = capsys.readouterr().err
    assert "refused:" in error
    assert "Traceback" not in error
    return error


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_images_come_back_from_the_files_alone(folder, capsys):
    assert capture("--index", "1") == 0
    printed = capsys.readouterr().out
    assert "2 image(s)" in printed
    assert "holds the images: never send it" in printed
    gradient = (folder / "gradient.safetensors").read_bytes()
    (folder / REFERENCE).rename(folder / "kept-apart.safetensors")  # the attack has nothing to read
    assert attack("--attack", "gauss-newton(iterations=60, restarts=3)") == 0
    printed = capsys.readouterr().out
    for word in ("returned 2 image(s) for a batch of 2", "stopped: ", "cost: ", "picture: recovered.png"):
        assert word in printed
    summary = json.loads((folder / "recovered.summary.json").read_text())
    assert summary["images"] == summary["gradient"]["batch_size"] == 2
    assert summary["gradient"]["task"] == "image-classification"
    (folder / "kept-apart.safetensors").rename(folder / REFERENCE)
    assert score() == 0
    printed = capsys.readouterr().out
    assert "recovered.comparison.png (holds the private images)" in printed
    mean = next(line for line in printed.splitlines() if line.strip().startswith("mean")).split()
    assert float(mean[5]) > 60  # PSNR in dB
    for name in ("recovered.png", "recovered.comparison.png"):
        assert Image.open(folder / name).size[0] > 300
    assert (folder / "gradient.safetensors").read_bytes() == gradient
    assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o600 for name in (REFERENCE, "recovered.safetensors"))


def test_the_files_hold_what_the_library_gives(folder):
    options = ["--defenses", "clip(max_norm=1)+gaussian(std=0.01)", "--seed", "7", "--index", "2"]
    assert capture(*options) == 0
    data = load_images("digits")
    adapter = lmleak.load_adapter("lenet8.yaml")
    batch = adapter.batch(adapter.normalization.normalize(data.pixels[4:6]), data.labels[4:6])
    expected = lmleak.parse_defense("clip(max_norm=1)+gaussian(std=0.01)", seed=7)(
        lmleak.capture_gradient(adapter, batch)
    )
    found = lmleak.SharedGradient.load("gradient.safetensors", adapter)
    assert found.labels.tolist() == data.labels[4:6].tolist()
    assert found.defenses == expected.defenses
    assert all(torch.equal(found.gradient[name], tensor) for name, tensor in expected.gradient.items())
    private = read_images(REFERENCE)
    assert torch.allclose(private.pixels, data.pixels[4:6].double(), atol=1e-6)
    assert private.labels.tolist() == data.labels[4:6].tolist()
    assert private.normalization == adapter.normalization
    assert attack("--attack", "gauss-newton(iterations=2)", "--seed", "3") == 0
    recovered = lmleak.run_attack("gauss-newton", adapter, found, iterations=2, seed=3)
    pixels = adapter.normalization.pixels(recovered.images.double())
    assert torch.equal(read_images("recovered.safetensors").pixels, pixels)
    with safe_open("gradient.safetensors", framework="pt") as file:  # nothing of the images travels with the gradient
        assert {name.split("/")[0] for name in file.keys()} == {"gradient", "labels"}  # noqa: SIM118


def test_scores_are_those_of_the_library_in_any_order(folder, capsys):
    """Written out by hand: errors per pixel value, over the deviation 0.3081 in units of the model's input."""
    assert capture() == 0
    private = read_images(REFERENCE)
    guess = private.pixels.flip(0) + 0.1
    save_file({"pixels": guess}, "recovered.safetensors")  # as another tool may write it
    capsys.readouterr()
    assert score("--picture", "grid.png") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    first = next(row for row in rows if row[:1] == ["1"])
    assert first[2:6] == [f"{v:.2g}" for v in ((0.1 / 0.3081) ** 2, 0.1 / 0.3081, 0.1**2, 0.1)]
    assert first[-1] == "2"  # the second recovered image was matched to the first private one
    assert (folder / "grid.png").exists()


def test_the_batch_comes_from_other_data_too(folder, capsys):
    colours = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.savez("images.npz", x=colours, y=np.array([2, 0, 1]))
    (folder / "colour.yaml").write_text("architecture: mlp-512\nimage_shape: [3, 8, 8]\nnum_classes: 3\n")
    assert capture("--data", "images.npz", "--index", "1", "--no-reveal-labels", model="colour.yaml", size="1") == 0
    private = read_images(REFERENCE)
    assert torch.allclose(private.pixels[0], torch.from_numpy(colours[1]).double().permute(2, 0, 1) / 255, atol=1e-6)
    assert private.labels.tolist() == [0]
    assert lmleak.SharedGradient.load("gradient.safetensors").labels is None
    for place, name in enumerate(("cats", "dogs")):
        (folder / "tree" / name).mkdir(parents=True)
        Image.fromarray(colours[place]).save(folder / "tree" / name / "a.png")
    assert capture("--data", "tree", "--index", "1", model="colour.yaml", size="1") == 0
    assert read_images(REFERENCE).labels.tolist() == [1]
    assert capture("--data", "tree", "--image-size", "8", "--index", "2", model="colour.yaml", size="1") == REFUSED
    assert "tree holds 2" in refusal(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "lenet"],
            "holds images of shape (1, 8, 8), and lenet reads (1, 28, 28); write image_size=28, or",
        ),
        (["--model", "resnet20"], "and resnet20 reads (3, 32, 32); give a shape file"),
        (["--model", "lenett"], "Did you mean 'lenet'"),
        (["--index", "1000"], "needs 2002 images, but digits holds 1797"),
        (["--data", "absent/mnist"], "absent/mnist"),
        (["--data", "./absent"], "no images at"),
        (["--split", "test"], "has no splits"),
        (["--image-size", "0"], "size must be a positive integer"),
        (["--texts", "hello"], "texts= is for texts, and 'lenet8.yaml' classifies images"),
        (["--no-reveal-lengths"], "reveal_lengths= is for texts"),
        (["--tokenizer", "reference-gpt2"], "reads no text"),
        (["--task", "causal-lm"], "classifies images and has no task 'causal-lm'"),
        (["--defenses", "prune(ratio=2)"], "ratio"),
        (["--reference", "gradient.safetensors"], "the reference must stay private"),
        (["--reference", "r.jsonl"], "images are kept in a .safetensors file"),
        (["--reference", "lenet8.yaml/r.safetensors"], "cannot write"),
        (["--model", "reference-gpt2", "--image-size", "8"], "image_size= is for images"),
    ],
)
def test_capture_refuses_bad_input_and_writes_nothing(folder, capsys, options, message):
    before = held(folder)
    assert capture(*options) == REFUSED
    assert message in refusal(capsys)
    assert held(folder) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack", "span"], "attack 'span' is for text, and this model's task is 'image-classification'"),
        (["--attack", "gauss-newtn"], "Did you mean 'gauss-newton'"),
        (["--attack", "gs(itertions=3)"], "Did you mean 'iterations'"),
        (["--attack", "gias"], "needs a decoder of public images"),
        (["--weights-seed", "1"], "need the same weights seed"),
        (["--model", "lenet"], "shape"),
        (["--model", "reference-gpt2"], "The gradient says task 'image-classification' and model 'lenet8.yaml'"),
        (["--output", "gradient.safetensors"], "would overwrite"),
        (["--output", "r.jsonl"], "recovered images go to a .safetensors file"),
        (["--output", "lenet8.yaml/r.safetensors"], "cannot write"),
    ],
)
def test_attack_refuses_bad_input_and_writes_nothing(folder, capsys, options, message):
    assert capture() == 0
    before = held(folder)
    capsys.readouterr()
    assert attack(*options) == REFUSED
    assert message in refusal(capsys)
    assert held(folder) == before


def test_an_attack_on_images_is_refused_for_texts(folder, capsys):
    assert main(["capture", "--model", "reference-gpt2", "--texts", "call Ana now", "--device", "cpu"]) == 0
    assert attack("--attack", "gauss-newton", model="reference-gpt2") == REFUSED
    assert "attack 'gauss-newton' is for images, and this model's task is 'causal-lm'" in refusal(capsys)


def write_header(path, **card):
    tensors = load_file(path)
    save_file(tensors, path, metadata={FORMAT: json.dumps(card)})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def double(path):
    tensors = load_file(path)
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (truncate, [], "not a readable safetensors file"),
        (lambda path: path.unlink(), [], "no file of images at recovered.safetensors"),
        (lambda path: save_file({"x": torch.zeros(2)}, path), [], "expected a tensor 'pixels'"),
        (double, [], "(4, 1, 8, 8)"),
        (lambda path: write_header(path, gradient=7), [], "the header of recovered.safetensors is damaged"),
        (lambda path: write_header(path, normalization={"mean": [0.5]}), [], "the header of recovered.safetensors is"),
        (lambda path: write_header(path, normalization={"mean": [0.5], "std": [0.5]}), [], "normalise pixels differ"),
        (None, ["--lamp-compat"], "lamp_compat is for texts"),
        (None, ["--picture", "."], "is a folder"),
    ],
)
def test_score_refuses_bad_files(folder, capsys, damage, options, message):
    assert capture() == 0
    assert attack("--attack", "gauss-newton(iterations=1)") == 0
    if damage is not None:
        damage(folder / "recovered.safetensors")
    before = held(folder)
    capsys.readouterr()
    assert score(*options) == REFUSED
    assert message in refusal(capsys)
    assert held(folder) == before


def test_images_left_from_an_earlier_attack_are_not_scored(capsys):
    assert capture() == 0
    assert attack("--attack", "gauss-newton(iterations=1)") == 0
    assert capture("--defenses", "gaussian(std=1, unit=rms)") == 0
    assert score() == REFUSED
    assert "left from an earlier attack?" in refusal(capsys)
    assert score("--any-gradient") == 0


def test_texts_and_images_are_not_scored_against_one_another(folder, capsys):
    assert capture() == 0
    (folder / "texts.txt").write_text("hello\nyou\n")
    assert main(["score", "texts.txt", REFERENCE]) == REFUSED
    assert "texts (texts.txt) cannot be scored against images" in refusal(capsys)
    assert main(["score", "texts.txt", "texts.txt", "--picture", "a.png"]) == REFUSED
    assert "picture= is drawn of images" in refusal(capsys)


def test_a_diverged_image_has_no_score_and_is_drawn_grey(folder, capsys):
    assert capture() == 0
    pixels = read_images(REFERENCE).pixels
    pixels[1] = float("nan")
    save_file({"pixels": pixels}, "recovered.safetensors")
    assert score() == 0
    printed = capsys.readouterr().out
    assert "1 recovered image(s) diverged" in printed
    assert next(line for line in printed.splitlines() if line.strip().startswith("mean")).split()[1] == "\u2013"


def test_a_file_keeps_its_numbers(folder):
    from lmleak.evaluation.image_records import ImageRecords

    pixels = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    written = ImageRecords(pixels, torch.tensor([1, 0, 2]), Normalization((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), "abc")
    found = read_images(written.save(folder / "a.safetensors"))
    assert torch.equal(found.pixels, pixels)
    assert found.labels.tolist() == [1, 0, 2]
    assert (found.normalization, found.gradient) == (written.normalization, "abc")
    assert Path("a.safetensors").read_bytes() == written.save(folder / "b.safetensors").read_bytes()
