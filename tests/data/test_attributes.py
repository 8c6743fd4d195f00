"""Attributes of texts and images: rules, marks that are what they say, groups that are kept together."""

import numpy as np
import pytest
import torch

from lmleak.data.attributes import COIN, AttributeData, load_texts, text_attributes
from lmleak.data.attributes_images import INJECTIONS, inject, load_marked_images
from lmleak.errors import ConfigError, DataError


def test_rules_read_the_words():
    texts = (
        "I saw Rosa at the clinic.", "Nobody called. The bill is 40 pounds and I'm late.",
        "Is it here?", "We don't know her name yet, and it rained on all of us for two long days.",
    )  # fmt: skip
    found = text_attributes(texts)
    assert found["name"].tolist() == [True, False, False, False]  # a capital after a full stop is no name, nor is I
    assert found["number"].tolist() == [False, True, False, False]
    assert found["negation"].tolist() == [False, True, False, True]
    assert found["question"].tolist() == [False, False, True, False]
    assert found["long"].tolist() == [False, True, False, True]


def test_messages_need_no_file_and_repeat():
    data, again = load_texts("messages", count=200, seed=3), load_texts("messages", count=200, seed=3)
    assert data.texts == again.texts
    assert len(data) == 200
    assert set(data.attributes) >= {"topic", "number", "name", "long", COIN}
    assert data.attributes[COIN].sum() == 100
    assert all(data.class_names[k] == topic for k, topic in zip(data.labels, data.attributes["topic"], strict=True))
    assert load_texts("messages", count=200, seed=4).texts != data.texts


def test_halves_share_no_author():
    groups = np.repeat(np.arange(20), 5)
    data = AttributeData("toy", None, (), {"a": groups % 2 == 0}, texts=tuple(map(str, range(100))), groups=groups)
    first, second = data.halves(seed=1)
    assert len(first) == len(second) == 50
    assert not set(first.groups) & set(second.groups)
    assert sorted(first.texts + second.texts, key=int) == list(data.texts)
    assert [int(t) // 5 for t in first.texts] == first.groups.tolist()
    assert (first.attributes["a"] == (first.groups % 2 == 0)).all()


@pytest.mark.parametrize("kind", INJECTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mark_changes_who_carries_it_and_keeps_pixels_in_range(kind, channels):
    pixels = torch.rand(6, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    values = np.array([True, False, True, False, True, False])
    marked = inject(pixels, values, kind)
    assert marked.min() >= 0 <= marked.max() <= 1
    changed = (marked != pixels).flatten(1).any(1).numpy()
    assert (changed == (values | (kind == "rotate"))).all()
    if kind == "rotate":  # the same turn back is nearly the image again; a turn the other way is not
        smooth = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)
        back = inject(inject(smooth, values, kind), ~values, kind)
        inner = (slice(None), slice(None), slice(3, 6), slice(3, 6))
        again = inject(inject(smooth, values, kind), values, kind)
        assert (back - smooth)[inner].abs().max() < (again - smooth)[inner].abs().max()


def test_the_mark_is_independent_of_the_class_and_the_group_is_not():
    data = load_marked_images("digits", count=1200, seed=0)
    mark, group = data.attributes["mark"], data.attributes["group"]
    assert mark.sum() == 600
    shares = [mark[data.labels == k].mean() for k in range(10)]
    assert max(abs(s - 0.5) for s in shares) < 0.2  # 120 images each: 4 standard errors are 0.18
    assert (group == (data.labels % 2 == 1)).all()
    plain = load_marked_images("digits", count=1200, seed=0, strength=1e-6)
    assert (data.pixels.mean((1, 2, 3)) > plain.pixels.mean((1, 2, 3)) + 0.02).numpy().tolist() == mark.tolist()


def test_shared_data_is_read(real_data):
    cola = load_texts("cola", folder=real_data, count=300)
    assert len(cola) == 300
    assert set(np.unique(cola.labels)) == {0, 1}
    authors = load_texts("synthpai", folder=real_data, count=300)
    assert authors.labels is None
    assert len(authors.groups) == 300
    for sex in ("female", "male"):
        assert (authors.attributes["sex"] == sex).sum() > 60
    one_author = authors.groups == authors.groups[0]
    assert len(set(authors.attributes["sex"][one_author])) == 1
    assert load_texts("sst2", folder=real_data, count=50).class_names == ("negative", "positive")
    assert load_marked_images("mnist", folder=real_data, count=20).pixels.shape == (20, 1, 28, 28)
    cifar = load_marked_images("cifar", folder=real_data, count=30, size=16)
    assert cifar.pixels.shape == (30, 3, 16, 16)
    animal = np.isin([cifar.class_names[k] for k in cifar.labels], ["bird", "cat", "deer", "dog", "frog", "horse"])
    assert (cifar.attributes["group"] == animal).all()


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="cola"):
        load_texts("colla")
    with pytest.raises(DataError, match="cannot be read"):
        load_texts("cola", folder=tmp_path)
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "in_domain_train.tsv").write_text("a\t1\t\tFine.\nb\t1\n")
    with pytest.raises(DataError, match="line 2: 2 columns where 4"):
        load_texts("cola", folder=tmp_path)
    with pytest.raises(ConfigError, match="strength"):
        inject(torch.zeros(1, 1, 4, 4), np.array([True]), "tint", strength=0)
    with pytest.raises(ConfigError, match="count"):
        load_marked_images("digits", count=0)
