"""The span attack at full size: GPT-2 small shape with GPT-2's own vocabulary, real sentences, real padding."""

import gzip
from pathlib import Path

import pytest
import torch

import lmleak

SHAPE = Path(__file__).resolve().parents[2] / "configs" / "models" / "gpt2.yaml"
STORIES = [
    "Lily was sad.", "Tom had a big dog.", "The cat ran to the tree.", "He was very happy.", "They went home.",
    "Mom said no.", "She saw a bird.", "It was a nice day.",
]  # fmt: skip


def cola(folder: Path, count: int) -> list[str]:
    lines = (folder / "cola" / "in_domain_train.tsv").read_text().splitlines()
    return [line.split("\t")[3] for line in lines[:count]]


def sst2(folder: Path, count: int) -> list[str]:
    with gzip.open(folder / "sst2" / "train.tsv.gz", "rt") as file:
        lines = file.read().splitlines()
    return [line.split("\t")[0] for line in lines[1 : count + 1]]


def score(adapter, batch):
    return lmleak.score_text(lmleak.run_attack("span", adapter, lmleak.capture_gradient(adapter, batch)), batch)


@pytest.mark.slow
def test_gpt2_small_shape(real_data):
    adapter = lmleak.load_adapter(str(SHAPE), tokenizer=str(real_data / "gpt2-bpe"))
    for sentences, count, side in ((cola, 8, "right"), (sst2, 4, "left")):
        batch = adapter.batch(sentences(real_data, count), padding_side=side)
        assert not batch.layout["attention_mask"].all()  # unequal lengths
        assert score(adapter, batch).exact_match == 1.0


@pytest.mark.slow
def test_gpt2_small_shape_random_tokens():
    adapter = lmleak.load_adapter(str(SHAPE))
    generator = torch.Generator().manual_seed(1)
    batch = adapter.batch(torch.randint(10, 50000, (8, 32), generator=generator).tolist())
    assert score(adapter, batch).exact_match == 1.0


def test_eight_story_sentences_on_the_pretrained_llama(real_data):
    adapter = lmleak.load_adapter(str(real_data / "stories260k" / "hf"))
    scores = score(adapter, adapter.batch(STORIES))
    assert min(scores.rouge1, scores.rouge2) >= 0.99
