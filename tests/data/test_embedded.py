"""The text, the samples and the models that the package ships."""

import json
import math
import random
import re
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lmleak.data.embedded import LABELS, REFERENCE_MODELS, messages, sample_messages
from lmleak.data.embedded.corpus import SLOT, grammar
from lmleak.data.embedded.vocabulary import train_byte_level_bpe, train_wordpiece, wordpieces
from lmleak.errors import ConfigError

AUTO = {"reference-bert": AutoModelForSequenceClassification, "reference-gpt2": AutoModelForCausalLM}
TRAINED_ON = {
    name: json.loads((path / "training.json").read_text())["config"] for name, path in REFERENCE_MODELS.items()
}
each_model = pytest.mark.parametrize("name", list(REFERENCE_MODELS))


def load(name):
    return AUTO[name].from_pretrained(REFERENCE_MODELS[name]), AutoTokenizer.from_pretrained(REFERENCE_MODELS[name])


@pytest.fixture(scope="module")
def training_text():
    (config,) = {(c["num_messages"], c["seed"]) for c in TRAINED_ON.values()}
    return messages(config[0], seed=config[1])


@pytest.fixture(scope="module")
def held_out(training_text):
    seen = {message.text for message in training_text}
    return [message for message in messages(400, seed=20_000) if message.text not in seen]


# ------------------------------------------------------------------------------------------- the generator


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40))
def test_messages_depend_on_the_seed_alone_and_shorter_lists_are_prefixes(seed, count):
    random.seed(1)
    state = random.getstate()
    longer = messages(count + 5, seed=seed)
    assert random.getstate() == state
    assert messages(count, seed=seed) == longer[:count]
    assert len(longer) == count + 5
    assert longer != messages(count + 5, seed=seed + 1)


def test_messages_of_a_seed_never_change():
    """The shipped models are reproducible only while the text is; change these words only with new models."""
    assert [message.text for message in messages(4, seed=0)] == PINNED


PINNED = [
    "Should I worry about blurred vision nine days after a vaccine? There is no cure for it.",
    "Our rent rises by 70 percent in December. Her joint account is rejected too. Thank you for listening.",
    "I sent the salary table to the wrong client on Wednesday.",
    "Theo Quenby is the real father of Dario. I cannot look her in the eye.",
]


def test_messages_are_balanced_varied_and_of_the_promised_length(training_text):
    texts = [message.text for message in training_text]
    lengths = [len(text.split()) for text in texts]
    words = Counter(re.findall(r"[a-z]+", " ".join(texts).lower()))
    assert Counter(message.label for message in training_text) == dict.fromkeys(range(4), len(texts) // 4)
    assert len(set(texts)) / len(texts) > 0.98
    assert (min(lengths), max(lengths)) == (6, 24)
    assert 13 < sum(lengths) / len(lengths) < 18
    assert sum(count >= 10 for count in words.values()) > 1300
    assert sum(bool(re.search(r"\d", text)) for text in texts) / len(texts) > 0.3


def test_sentences_are_whole():
    for message in messages(2000, seed=3):
        assert "{" not in message.text
        assert "  " not in message.text
        assert message.text[-1] in ".?"
        for sentence in re.split(r"(?<=[a-z0-9][.?]) ", message.text):
            assert sentence[0].isupper() or sentence[0].isdigit(), message.text


@pytest.mark.parametrize("topic", LABELS)
def test_every_slot_of_the_grammar_has_a_list_without_repeats(topic):
    lists = grammar(topic)
    for name, items in lists.items():
        assert all(item == item.strip() and item for item in items), name
        assert {slot for item in items for slot in SLOT.findall(item)} <= set(lists), name
        if name not in ("date", "amount"):  # repeated there to make a form commoner
            assert len(set(items)) == len(items), (name, [i for i, c in Counter(items).items() if c > 1])


def test_a_negative_count_is_refused():
    with pytest.raises(ConfigError, match=r"messages\(count=-1\).*at least 0"):
        messages(-1, seed=0)


# --------------------------------------------------------------------------------------------- the samples


def test_samples_are_balanced_short_and_each_given_once():
    samples = sample_messages()
    assert Counter(sample.label for sample in samples) == dict.fromkeys(range(4), 9)
    assert len({sample.text for sample in samples}) == 36
    assert all(6 <= len(sample.text.split()) <= 16 for sample in samples)
    samples.clear()
    assert len(sample_messages()) == 36


def test_no_six_words_of_a_sample_stand_in_the_training_text(training_text):
    def six(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    written = set().union(*(six(message.text) for message in training_text))
    assert {
        sample.text: six(sample.text) & written for sample in sample_messages() if six(sample.text) & written
    } == {}


@each_model
def test_samples_survive_the_tokenizer(name):
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_MODELS[name])
    lossless = name == "reference-gpt2"
    normal = (lambda text: text) if lossless else (lambda text: re.sub(r"\s", "", text.lower()))
    tokens = 0
    for sample in sample_messages():
        ids = tokenizer(sample.text)["input_ids"]
        tokens += len(ids)
        assert len(ids) <= 32
        assert lossless or tokenizer.unk_token_id not in ids
        assert normal(tokenizer.decode(ids, skip_special_tokens=True)) == normal(sample.text)
    words = sum(len(sample.text.split()) for sample in sample_messages())
    assert tokens / words < (1.45 if lossless else 1.35)  # most words are one token


def test_bert_samples_are_mostly_whole_words():
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_MODELS["reference-bert"])
    words = [word for s in sample_messages() for word in re.findall(r"[a-z]+", s.text.lower())]
    assert sum(word in tokenizer.get_vocab() for word in words) / len(words) > 0.97


# ---------------------------------------------------------------------------------------------- the models


@each_model
def test_a_model_is_small_complete_and_names_no_machine(name):
    folder = REFERENCE_MODELS[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in text
        if file.name != "tokenizer.json":  # whose vocabulary holds the slash itself
            assert not [value for value in re.findall(r'"([^"]*)"', text) if re.match(r"/|[A-Za-z]:\\|~", value)]
            assert not re.search(r"https?:|/(home|tmp|root|work|Users)/", text)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [
        {"reference-bert": "BertForSequenceClassification", "reference-gpt2": "GPT2LMHeadModel"}[name]
    ]


@each_model
def test_a_model_loads_whole_in_evaluation_mode_and_repeats_itself(name):
    model, info = AUTO[name].from_pretrained(REFERENCE_MODELS[name], output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_MODELS[name])
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer) == TRAINED_ON[name]["vocab_size"]
    batch = tokenizer([s.text for s in sample_messages()[:4]], padding=True, return_tensors="pt")
    with torch.no_grad():
        first, second = model(**batch).logits, model(**batch).logits
    assert torch.equal(first, second)
    assert first.isfinite().all()


def test_the_classifier_names_the_topics():
    model, _ = load("reference-bert")
    assert tuple(model.config.id2label[i] for i in range(model.config.num_labels)) == LABELS
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}


def test_the_language_model_shares_its_head_with_the_embeddings():
    model, tokenizer = load("reference-gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id == 0
    assert tokenizer.model_max_length == model.config.n_positions == 64


def test_the_classifier_is_good_but_not_certain(held_out):
    model, tokenizer = load("reference-bert")

    def judge(chosen):
        batch = tokenizer([m.text for m in chosen], padding=True, return_tensors="pt")
        labels = torch.tensor([m.label for m in chosen])
        with torch.no_grad():
            logits = model(**batch).logits
        return (logits.argmax(-1) == labels).float().mean().item(), cross_entropy(logits, labels).item()

    accuracy, loss = judge(held_out)
    assert accuracy >= 0.9
    assert 0.15 < loss < 0.4  # uniform: log 4 = 1.39
    assert judge(sample_messages())[0] >= 0.75


def test_every_sample_gives_the_classifier_a_gradient():
    model, tokenizer = load("reference-bert")
    parameters = dict(model.named_parameters())
    whole, encoder = [], []
    for sample in sample_messages():
        batch = tokenizer(sample.text, return_tensors="pt")
        loss = cross_entropy(model(**batch).logits, torch.tensor([sample.label]))
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        whole.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        encoder.append(math.sqrt(sum(g.square().sum().item() for n, g in gradients.items() if ".layer." in n)))
    assert min(whole) > 1
    assert min(encoder) > 0.05  # a saturated pooler would let nothing through to the blocks
    assert statistics.median(encoder) > 0.3
    assert statistics.mean(whole) == pytest.approx(card("reference-bert")["sample_gradient_norm_mean"], rel=1e-2)


def card(name):
    return json.loads((REFERENCE_MODELS[name] / "training.json").read_text())["results"]


def test_the_language_model_knows_the_text(held_out):
    model, tokenizer = load("reference-gpt2")

    def loss_on(chosen):
        batch = tokenizer([m.text for m in chosen], padding=True, return_tensors="pt")
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.no_grad():
            return model(**batch, labels=targets).loss.item()

    uniform = math.log(len(tokenizer))
    assert loss_on(held_out) < 0.4 * uniform
    assert loss_on(sample_messages()) < 0.75 * uniform  # hand-written, so harder


# ----------------------------------------------------------------------------------- the tokenizers


@pytest.mark.parametrize("train", [train_wordpiece, train_byte_level_bpe])
def test_a_tokenizer_has_the_size_asked_for_and_is_the_same_every_time(train):
    texts = [message.text for message in messages(1500, seed=1)]
    first, second = train(texts, 600, 48), train(texts, 600, 48)
    assert len(first) == 600
    assert first.model_max_length == 48
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


@pytest.mark.parametrize("name", ["reference-bert", "reference-gpt2"])
def test_the_shipped_vocabulary_is_what_its_configuration_gives(name, training_text):
    config = TRAINED_ON[name]
    train = {"reference-bert": train_wordpiece, "reference-gpt2": train_byte_level_bpe}[name]
    fresh = train([m.text for m in training_text], config["vocab_size"], config["positions"])
    assert fresh.get_vocab() == AutoTokenizer.from_pretrained(REFERENCE_MODELS[name]).get_vocab()


def test_wordpieces_break_ties_by_the_alphabet_and_refuse_too_small_a_size():
    words = {"ring": 3, "sing": 3, "king": 3, "zebra": 1, "a": 9}
    alphabet = len(wordpieces(words, 400)) - len({"##ng", "##ing"}) - 4
    chosen = wordpieces(words, alphabet * 10 // 9 + 4)
    assert [w for w in chosen if w in words and len(w) > 1][:3] == ["king", "ring", "sing"]
    assert wordpieces(dict(reversed(words.items())), 400) == wordpieces(words, 400)
    with pytest.raises(ConfigError, match=r"no room for .* single characters"):
        wordpieces(words, 10)
