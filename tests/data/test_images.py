"""Reading images: every source, every refusal, real files where they are present."""

import gzip
import io
import struct
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lmleak.data import NORMALIZATIONS, ImageData, load_images
from lmleak.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def encoded(array, kind="png", **keywords):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **keywords)
    return buffer.getvalue()


def idx(values):
    magic = 2051 if values.ndim == 3 else 2049
    return struct.pack(f">{1 + values.ndim}I", magic, *values.shape) + values.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A tiny pair of MNIST files."""
    images, labels = PIXELS[..., 0], np.array([3, 1, 4, 1, 5, 9], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path, images, labels


@pytest.fixture
def tree(tmp_path):
    """Three classes of unequal size below two splits, as a folder."""
    for split in ("train", "test"):
        for n, (name, count) in enumerate({"cat": 3, "ant": 1, "bee": 2}.items()):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(encoded(PIXELS[n + i] // (2 if split == "test" else 1)))
    (tmp_path / "tree" / "test" / "cat" / "._0.png").write_bytes(b"of another system")
    (tmp_path / "tree" / "readme.txt").write_text("no image")
    return tmp_path / "tree"


def test_digits_by_default():
    data = load_images()
    assert data.pixels.shape == (1797, 1, 8, 8)
    assert data.pixels.dtype == torch.float32
    assert (data.pixels.min(), data.pixels.max()) == (0, 1)
    assert data.labels.dtype == torch.int64
    assert data.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert (data.name, data.class_names[7], len(data)) == ("digits", "7", 1797)
    larger = load_images(size=28, limit=3)
    assert larger.image_shape == (1, 28, 28)
    assert torch.allclose(larger.pixels.mean((1, 2, 3)), data.pixels[:3].mean((1, 2, 3)), atol=0.02)


@pytest.mark.parametrize("which", ["folder", "file", "unpacked"])
def test_mnist_files(mnist, which):
    folder, images, labels = mnist
    source = folder if which == "folder" else folder / "t10k-images-idx3-ubyte.gz"
    if which == "unpacked":
        for file in list(folder.iterdir()):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
        source = folder / "t10k-images-idx3-ubyte"
    data = load_images(str(source))
    assert data.image_shape == (1, 5, 4)
    assert torch.equal(data.pixels[:, 0], torch.from_numpy(images.copy()).float() / 255)
    assert data.labels.tolist() == labels.tolist()
    assert data.class_names == tuple("0123456789")


def test_mnist_folder_of_two_splits(mnist):
    folder, images, labels = mnist
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images[:2]))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels[:2]))
    assert len(load_images(str(folder), split="train")) == 2
    assert len(load_images(str(folder), split="t10k")) == 6
    with pytest.raises(DataError, match="holds 2 files"):
        load_images(str(folder))
    with pytest.raises(DataError, match="holds 0 files"):
        load_images(str(folder), split="val")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read"),
        (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])), "is truncated"),
        (lambda path: path.write_bytes(gzip.compress(b"abc")), "no idx file of images"),
        (lambda path: path.write_bytes(b"hello"), "cannot be read"),
        (lambda path: path.with_name("t10k-labels-idx1-ubyte.gz").unlink(), "cannot be read"),
        (
            lambda path: path.with_name("t10k-labels-idx1-ubyte.gz").write_bytes(path.read_bytes()),
            "no idx file of lab",
        ),
        (lambda path: path.write_bytes(gzip.compress(idx(PIXELS[:5, ..., 0]))), "5 images and 6 labels"),
        (lambda path: path.write_bytes(gzip.compress(idx(PIXELS[:0, ..., 0]))), "holds no images"),
    ],
)
def test_damaged_mnist_files_are_refused(mnist, damage, message):
    damage(mnist[0] / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=message):
        load_images(str(mnist[0]))


def test_npz(tmp_path):
    np.savez(tmp_path / "c.npz", x=PIXELS, y=np.array([0, 1, 2, 0, 1, 2], np.uint8), classes=["a", "b", "c"])
    data = load_images(str(tmp_path / "c.npz"), limit=4)
    assert torch.equal(data.pixels, torch.from_numpy(PIXELS[:4]).permute(0, 3, 1, 2).float() / 255)
    assert (data.labels.tolist(), data.class_names) == ([0, 1, 2, 0], ("a", "b", "c"))
    np.savez(tmp_path / "grey.npz", x=PIXELS[..., 0], y=np.arange(6))
    assert load_images(str(tmp_path / "grey.npz")).image_shape == (1, 5, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": PIXELS}, "no array 'y'"),
        ({"x": PIXELS.astype(float), "y": np.arange(6)}, "x must be uint8"),
        ({"x": PIXELS[..., :2], "y": np.arange(6)}, "1 or 3"),
        ({"x": PIXELS, "y": np.arange(5)}, "y must be 6 integers"),
        ({"x": PIXELS, "y": np.arange(6) / 2}, "y must be 6 integers"),
        ({"x": PIXELS, "y": np.arange(6) - 1}, "labels range from -1 to 4"),
        ({"x": PIXELS, "y": np.arange(6), "classes": ["a"]}, "there are 1 classes"),
        ({"x": PIXELS[:0], "y": np.arange(0)}, "holds no images"),
        ({"x": np.array([object()]), "y": np.arange(1)}, "without pickled objects"),
    ],
)
def test_wrong_npz_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path / "c.npz"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"hello"])
def test_damaged_npz_and_zip_are_refused(tmp_path, damage):
    for name in ("c.npz", "c.zip"):
        path = tmp_path / name
        np.savez(tmp_path / "whole.npz", x=PIXELS, y=np.arange(6))
        path.write_bytes(damage((tmp_path / "whole.npz").read_bytes()))
        with pytest.raises(DataError, match="cannot be read as"):
            load_images(str(path))
        with pytest.raises(DataError, match="cannot be read as"):
            load_images(str(tmp_path / f"absent{path.suffix}"))


def test_folders_and_archives_agree(tree):
    data = load_images(str(tree), split="test")
    assert data.class_names == ("ant", "bee", "cat")
    assert data.labels.tolist() == [0, 1, 2, 1, 2, 2]  # in turn, then what is left
    assert torch.equal(data.pixels[0], torch.from_numpy(PIXELS[1] // 2).permute(2, 0, 1).float() / 255)
    with zipfile.ZipFile(tree.parent / "tree.zip", "w") as archive:
        for file in tree.rglob("*"):
            archive.write(file, file.relative_to(tree))
    zipped = load_images(str(tree.parent / "tree.zip"), split="test")
    assert torch.equal(zipped.pixels, data.pixels)
    assert torch.equal(zipped.labels, data.labels)
    assert load_images(str(tree / "test"), limit=2).labels.tolist() == [0, 1]


def test_wrong_folders_are_refused(tree, tmp_path):
    with pytest.raises(DataError, match=r"under \['test', 'train'\]; pass split="):
        load_images(str(tree))
    with pytest.raises(ConfigError, match="no split 'val'"):
        load_images(str(tree), split="val")
    folder = tree / "train"
    (folder / "ant" / "1.png").write_bytes(encoded(PIXELS[0])[:60])
    with pytest.raises(DataError, match=r"ant/1.png is no image, or a damaged one"):
        load_images(str(folder))
    (folder / "ant" / "1.png").write_bytes(encoded(np.zeros((5, 4), np.uint16)))
    with pytest.raises(DataError, match="of mode 'I;16' are not read"):
        load_images(str(folder))
    (folder / "ant" / "1.png").rename(folder / "1.png")
    with pytest.raises(DataError, match=r"1.png lies in no class folder"):
        load_images(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_images(str(tmp_path / "empty"))


def test_mixed_sizes_and_modes(tree):
    (tree / "train" / "ant" / "0.png").write_bytes(encoded(PIXELS[0, :4, :, 0]))
    with pytest.raises(DataError, match="images of 2 sizes"):
        load_images(str(tree), split="train")
    data = load_images(str(tree), split="train", size=6)
    assert data.pixels.shape == (6, 3, 6, 6)
    assert torch.equal(data.pixels[0, 0], data.pixels[0, 2])  # grey among colours
    assert data.pixels.min() >= 0
    assert data.pixels.max() <= 1


@pytest.mark.parametrize("named", [True, False])
def test_hub_data_sets(monkeypatch, named):
    label = datasets.ClassLabel(names=["no", "yes"]) if named else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "label": label, "note": datasets.Value("string")})
    rows = {"img": [{"bytes": encoded(p), "path": None} for p in PIXELS[:3]], "label": [1, 0, 1], "note": ["x"] * 3}
    dataset, asked = datasets.Dataset.from_dict(rows, features=features), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or dataset)
    data = load_images("someone/images:small", limit=2)
    assert asked == [(("someone/images", "small"), {"split": "train"})]
    assert torch.equal(data.pixels, torch.from_numpy(PIXELS[:2]).permute(0, 3, 1, 2).float() / 255)
    assert data.labels.tolist() == [1, 0]
    assert data.class_names == (("no", "yes") if named else ("0", "1"))
    with pytest.raises(DataError, match="no column 'fine'; pass label_column="):
        load_images("someone/images", label_column="fine")
    with pytest.raises(DataError, match="column 'note' holds no images"):
        load_images("someone/images", image_column="note")


@pytest.mark.parametrize(
    ("source", "keywords", "error", "message"),
    [
        ("nothing-of-this-name", {}, DataError, "neither 'digits'"),
        ("./nothing", {}, DataError, "no images at"),
        ("digits", {"split": "test"}, ConfigError, "has no splits"),
        ("digits", {"limit": 0}, ConfigError, "limit must be a positive integer"),
        ("digits", {"size": 2.5}, ConfigError, "size must be a positive integer"),
    ],
)
def test_wrong_sources_and_options_are_refused(source, keywords, error, message):
    with pytest.raises(error, match=message):
        load_images(source, **keywords)


def test_normalization_is_carried_to_pixels():
    pixels = (
        torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 0.5, 0.1])[:, None, None]
    )
    data = ImageData(pixels, torch.zeros(50, dtype=torch.int64), ("a",), "random")
    normalization = data.normalization()
    x = normalization.normalize(pixels)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)
    assert torch.allclose(normalization.pixels(x), pixels, atol=1e-6)
    assert data.normalization("cifar10") is NORMALIZATIONS["cifar10"]
    with pytest.raises(DataError, match=r"1 channel.*'cifar10' normalises 3"):
        load_images(limit=2).normalization("cifar10")
    with pytest.raises(ConfigError, match="Did you mean 'imagenet'"):
        data.normalization("imgnet")
    with pytest.raises(DataError, match="no deviation"):
        ImageData(pixels * 0, data.labels, ("a",), "black").normalization()


def test_batches_are_consecutive_and_whole():
    data = load_images(limit=10)
    batches = list(data.batches(3, start=2))
    assert [labels.tolist() for _, labels in batches] == [[2, 3, 4], [5, 6, 7]]
    assert torch.equal(batches[1][0], data.pixels[5:8])
    for size, start in ((0, 0), (3, 8), (11, 0), (1, -1)):
        with pytest.raises(ConfigError, match="no batch of"):
            data.batches(size, start)


def test_real_files(real_data):
    mnist = load_images(str(real_data / "mnist"), limit=100)
    assert mnist.labels[:9].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5]
    assert mnist.image_shape == (1, 28, 28)
    decoded = load_images(str(real_data / "cifar10-jpg" / "cifar10_test1000.npz"), limit=50)
    zipped = load_images(str(real_data / "cifar10-jpg" / "cifar10_jpg_200perclass.zip"), split="test", limit=50)
    assert zipped.class_names == decoded.class_names
    assert torch.equal(zipped.labels, decoded.labels)
    assert (zipped.pixels - decoded.pixels).abs().max() <= 2 / 255  # decoders of JPEG may differ by a level


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 8, 0)])
def test_images_without_pixels_are_refused(tmp_path, shape, size):
    np.savez(tmp_path / "flat.npz", x=np.zeros(shape, np.uint8), y=np.zeros(2, np.int64))
    with pytest.raises(DataError, match="without pixels"):
        load_images(str(tmp_path / "flat.npz"), size=size)
