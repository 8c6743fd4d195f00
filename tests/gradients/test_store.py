"""The gradient store: what is written is read, kills lose at most a shard, and settings never mix."""

import json

import pytest
import torch

from lmleak.adapters import LeNet, adapt
from lmleak.errors import ConfigError, DataError
from lmleak.gradients.per_example import per_example_gradients, shared_layers
from lmleak.gradients.projection import principal_components, project_on, random_projection
from lmleak.gradients.store import GradientStore, GradientStoreWriter, store_gradients

LAYERS = {"first": ("a", "b"), "second/odd name": ("c",)}
SIZES = {"a": (3, 5), "b": (5,), "c": (40,)}


def gradients(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randn(count, *shape, generator=generator) for name, shape in SIZES.items()}
    return rows, {"label": torch.arange(count) % 2}


def write(path, count=10, parts=3, **options):
    rows, attributes = gradients(count)
    settings = {"layers": LAYERS, "features": 8, "shard_size": 4} | options
    with GradientStoreWriter(path, **settings) as writer:
        for i in range(writer.num_examples, count, parts):
            window = slice(i, min(i + parts, count))
            writer.append({n: v[window] for n, v in rows.items()}, {n: v[window] for n, v in attributes.items()})
    return rows, attributes


def test_features_and_attributes_are_those_written_whatever_the_parts(tmp_path):
    rows, attributes = write(tmp_path / "s")
    store = GradientStore(tmp_path / "s")
    assert store.layers == tuple(LAYERS)
    assert len(store) == 10
    assert torch.equal(store.attribute("label"), attributes["label"])
    for layer, names in LAYERS.items():
        expected = random_projection([rows[n] for n in names], 8, layer=layer, seed=0)
        torch.testing.assert_close(store.features(layer), expected, rtol=1e-6, atol=1e-6)
    write(tmp_path / "whole", parts=10)
    for layer in LAYERS:
        assert torch.equal(GradientStore(tmp_path / "whole").features(layer), store.features(layer))
    with pytest.raises(ConfigError, match="second/odd name"):
        store.features("second/od name")


def test_a_small_layer_is_kept_as_it_is(tmp_path):
    rows, _ = write(tmp_path, features=40)
    expected = torch.cat([rows["a"].flatten(1), rows["b"]], 1)
    assert torch.equal(GradientStore(tmp_path).features("first"), expected)


def test_random_projection_preserves_inner_products_on_average():
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(2, 300, generator=generator, dtype=torch.float64)
    g[1] += g[0]
    exact, k, draws = (g[0] @ g[1]).item(), 16, 400
    products = []
    for seed in range(draws):
        z = random_projection([g[:, :100], g[:, 100:].reshape(2, 20, 10)], k, layer="l", seed=seed).double()
        products.append((z[0] @ z[1]).item())
    products = torch.tensor(products)
    bound = ((g[0].square().sum() * g[1].square().sum() + exact**2) / k).item()
    assert abs(products.mean().item() - exact) < 4 * (bound / draws) ** 0.5
    assert products.var().item() < 1.3 * bound


def test_random_projection_draws_every_layer_for_itself():
    g = torch.ones(1, 50)
    one = random_projection([g], 8, layer="one", seed=0)
    assert torch.equal(one, random_projection([g], 8, layer="one", seed=0))
    assert not torch.equal(one, random_projection([g], 8, layer="other", seed=0))
    assert not torch.equal(one, random_projection([g], 8, layer="one", seed=1))


def test_principal_components_are_those_of_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(12, 30, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, 30)
    mean, axes = principal_components([g[:, :10], g[:, 10:]], 4)
    torch.testing.assert_close((axes @ axes.T).double(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    singular = torch.linalg.svdvals(g - g.mean(0))
    torch.testing.assert_close(project_on([g], mean, axes).double().norm(dim=0), singular[:4], rtol=1e-5, atol=0)
    with pytest.raises(DataError, match="all equal"):
        principal_components([torch.ones(5, 3)], 2)


def test_pca_is_fitted_on_the_first_shard_and_used_for_all(tmp_path):
    rows, _ = write(tmp_path, projection="pca")
    mean, axes = principal_components([rows["c"][:4]], 8)
    found = GradientStore(tmp_path).features("second/odd name")
    assert found.shape == (10, 3)  # four examples span three directions
    torch.testing.assert_close(found, project_on([rows["c"]], mean, axes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", ["random", "pca"])
def test_a_killed_writer_goes_on_at_the_last_whole_shard(tmp_path, projection):
    rows, attributes = gradients(10)
    settings = {"layers": LAYERS, "features": 8, "shard_size": 4, "projection": projection}
    killed = GradientStoreWriter(tmp_path / "killed", **settings)
    killed.append({n: v[:7] for n, v in rows.items()}, {n: v[:7] for n, v in attributes.items()})
    assert killed.num_examples == 4  # three more were pending and are lost
    (tmp_path / "killed" / ".shard-000001.safetensors.part").write_bytes(b"torn")
    assert GradientStoreWriter(tmp_path / "killed", **settings).num_examples == 4
    write(tmp_path / "killed", projection=projection)
    write(tmp_path / "whole", projection=projection)
    one, other = GradientStore(tmp_path / "killed"), GradientStore(tmp_path / "whole")
    assert torch.equal(one.attribute("label"), other.attribute("label"))
    for layer in LAYERS:
        torch.testing.assert_close(one.features(layer), other.features(layer), rtol=1e-6, atol=1e-6)


def test_a_closed_store_is_continued_within_its_last_shard(tmp_path):
    write(tmp_path / "continued", count=6)
    _, attributes = gradients(10)
    with GradientStoreWriter(tmp_path / "continued", layers=LAYERS, features=8, shard_size=4) as writer:
        assert writer.num_examples == 6
        tail = gradients(6)[0]
        writer.append({n: v[2:6] for n, v in tail.items()}, {"label": attributes["label"][2:6]})
    store = GradientStore(tmp_path / "continued")
    assert len(store) == 10
    assert len(list((tmp_path / "continued").glob("shard-*"))) == 3
    assert torch.equal(store.features("first")[6:], store.features("first")[2:6])


def test_a_truncated_last_shard_is_refused_by_the_reader_and_written_again(tmp_path):
    write(tmp_path)
    before = GradientStore(tmp_path).features("first")
    last = sorted(tmp_path.glob("shard-*"))[-1]
    last.write_bytes(last.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"shard-000002.*truncated"):
        GradientStore(tmp_path)
    assert GradientStoreWriter(tmp_path, layers=LAYERS, features=8, shard_size=4).num_examples == 8
    rows, attributes = gradients(10)
    with GradientStoreWriter(tmp_path, layers=LAYERS, features=8, shard_size=4) as writer:
        writer.append({n: v[8:] for n, v in rows.items()}, {"label": attributes["label"][8:]})
    torch.testing.assert_close(GradientStore(tmp_path).features("first"), before, rtol=1e-6, atol=1e-6)


def test_a_damaged_or_missing_middle_shard_is_refused(tmp_path):
    write(tmp_path)
    middle = tmp_path / "shard-000001.safetensors"
    whole = middle.read_bytes()
    middle.write_bytes(whole[:50])
    for open_store in (GradientStore, lambda p: GradientStoreWriter(p, layers=LAYERS, features=8, shard_size=4)):
        with pytest.raises(DataError, match=r"shard-000001.*damaged"):
            open_store(tmp_path)
    middle.unlink()
    with pytest.raises(DataError, match="lacks shard-000001"):
        GradientStore(tmp_path)


@pytest.mark.parametrize(
    "other", [{"features": 12}, {"seed": 1}, {"layers": {"first": ("a",)}}, {"identity": {"weights": "other"}}]
)
def test_other_settings_are_refused(tmp_path, other):
    write(tmp_path)
    settings = {"layers": LAYERS, "features": 8, "shard_size": 4} | other
    with pytest.raises(ConfigError, match=f"another {next(iter(other))}"):
        GradientStoreWriter(tmp_path, **settings)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="no gradient store"):
        GradientStore(tmp_path)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        GradientStoreWriter(tmp_path, layers=LAYERS)
    (tmp_path / "store.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="does not say format"):
        GradientStore(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 4"):
        GradientStoreWriter(tmp_path / "new", layers=LAYERS, features=6)


def test_wrong_rows_are_refused(tmp_path):
    rows, attributes = gradients(3)
    writer = GradientStoreWriter(tmp_path, layers=LAYERS, features=8)
    with pytest.raises(DataError, match="has no 'c'"):
        writer.append({"a": rows["a"], "b": rows["b"]})
    with pytest.raises(DataError, match="one row per example"):
        writer.append(rows, {"label": attributes["label"][:2]})
    with pytest.raises(DataError, match="NaN or Inf"):
        writer.append(rows | {"c": rows["c"] * torch.inf})
    writer.append(rows, attributes)
    with pytest.raises(DataError, match="earlier examples have"):
        writer.append(rows)


def test_attributes_are_those_of_earlier_shards_too(tmp_path):
    rows, attributes = gradients(4)
    settings = {"layers": LAYERS, "features": 8, "shard_size": 4}
    writer = GradientStoreWriter(tmp_path, **settings)
    writer.append(rows, attributes)  # exactly a shard, so nothing is pending
    for other in (writer, GradientStoreWriter(tmp_path, **settings)):
        for wrong in ({"lable": attributes["label"]}, {}, {"label": attributes["label"][:, None]},
                      {"label": attributes["label"].double()}):  # fmt: skip
            with pytest.raises(DataError, match="earlier examples have"):
                other.append(rows, wrong)
    other.append(rows, attributes)
    assert torch.equal(GradientStore(tmp_path).attribute("label"), attributes["label"].repeat(2))


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    _, attributes = write(tmp_path)
    store = GradientStore(tmp_path)
    every = store.features("first")
    for rows in ([9, 0, 5, 5, 2], torch.tensor([3, 1]), [0, 4, 9], list(range(9, -1, -1))):
        assert torch.equal(store.features("first", rows), every[torch.as_tensor(rows)])
        assert torch.equal(store.attribute("label", rows), attributes["label"][torch.as_tensor(rows)])


@pytest.mark.parametrize("rows", [[10], [-1], [0, 99], [], [0.5], [True], [[0]], ["a"]])
def test_rows_that_do_not_exist_are_refused(tmp_path, rows):
    write(tmp_path)
    with pytest.raises(DataError, match=r"holds examples 0 to 9|rows must be"):
        GradientStore(tmp_path).features("first", rows)


def test_flipped_bytes_are_refused_when_read(tmp_path):
    write(tmp_path)
    expected = GradientStore(tmp_path).features("first")
    middle = tmp_path / "shard-000001.safetensors"
    whole = middle.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    start, _ = header["features/first"]["data_offsets"]
    for place in (
        8 + length + start + 5,
        whole.index(json.loads(header["__metadata__"]["digests"])["features/first"].encode()),
    ):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        middle.write_bytes(flipped)
        store = GradientStore(tmp_path)
        with pytest.raises(DataError, match=r"shard-000001.*is damaged.*delete it and the later shards"):
            store.features("first")
        for rows in ([0, 1], [9]):  # other shards are whole
            assert torch.equal(store.features("first", rows), expected[rows])
    middle.write_bytes(whole)
    assert torch.equal(GradientStore(tmp_path).features("first"), expected)


def test_a_partial_shard_and_axes_are_verified_before_they_are_continued(tmp_path):
    settings = {"layers": LAYERS, "features": 8, "shard_size": 4, "projection": "pca"}
    write(tmp_path, projection="pca")
    for name in ("shard-000002.safetensors", "basis.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{name} is damaged"):
            GradientStoreWriter(tmp_path, **settings)
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "basis.safetensors").unlink()
    with pytest.raises(DataError, match="lacks basis"):
        GradientStoreWriter(tmp_path, **settings)


def test_stores_without_digests_are_refused_with_advice(tmp_path):
    write(tmp_path)
    settings = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(settings | {"version": 1}))
    with pytest.raises(DataError, match="choose another folder, or delete that one"):
        GradientStore(tmp_path)


def test_gradients_of_a_model_are_stored_and_resumed_by_number(tmp_path):
    adapter = adapt(LeNet(size=8, num_classes=3))
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.rand(14, 1, 8, 8, generator=generator), torch.arange(14) % 3

    def batches(stop=14):
        for i in range(0, stop, 5):
            window = slice(i, min(i + 5, stop))
            batch = adapter.batch(pixels[window], labels[window])
            yield batch, {"label": labels[window], "pixels": pixels[window].flatten(1)}

    layers = shared_layers(adapter, "all")
    other = GradientStoreWriter(tmp_path / "b", layers=layers, identity={"weights": "of-another-model"})
    with pytest.raises(ConfigError, match="at weights of-another-model"):
        store_gradients(other, adapter, batches(), shared="all")

    def writer(path):
        return GradientStoreWriter(path, layers=layers, features=16, shard_size=4)

    store_gradients(writer(tmp_path / "a"), adapter, batches(7), shared="all")
    store_gradients(writer(tmp_path / "a"), adapter, batches(), shared="all")
    store = GradientStore(tmp_path / "a")
    assert torch.equal(store.attribute("label"), labels)
    assert torch.equal(store.attribute("pixels"), pixels.flatten(1))
    whole = per_example_gradients(adapter, adapter.batch(pixels, labels), shared="all").gradient
    for layer, names in layers.items():
        expected = random_projection([whole[n] for n in names], 16, layer=layer, seed=0)
        torch.testing.assert_close(store.features(layer), expected, rtol=1e-4, atol=1e-5)
