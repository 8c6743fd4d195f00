"""Batches of text: what is kept, what is public, what is refused."""

import numpy as np
import pytest
import torch

from lmleak.adapters import adapt
from lmleak.errors import DataError, UnsupportedModelError
from lmleak.gradients import capture_gradient
from lmleak.types import IGNORE
from tests.families import FAMILIES, LABELS, MASK_TOKEN, POSITIONS, SEQUENCES, IdTokenizer, build, make


class BertTokenizer(IdTokenizer):
    """[CLS] = 1 before and [SEP] = 2 after the numbers of a text."""

    cls_token_id, sep_token_id = 1, 2
    all_special_ids = [0, 1, 2, MASK_TOKEN]  # noqa: RUF012 (a constant of a test double)

    def __call__(self, text, add_special_tokens=True):
        assert add_special_tokens
        return {"input_ids": [1, *(int(word) for word in text.split()), 2]}


def bert(task="sequence-classification"):
    _, model = build("bert" if task == "sequence-classification" else "bert-mlm")
    return adapt(model, tokenizer=BertTokenizer(), task=task)


def test_a_batch_holds_the_texts_and_their_private_tokens():
    adapter = bert()
    batch = adapter.batch(["7 12 33", "50"], [2, 0])
    assert batch.inputs["input_ids"].tolist() == [[1, 7, 12, 33, 2], [1, 50, 2, 0, 0]]
    assert batch.layout["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [2, 0]
    assert batch.token_ids == ((7, 12, 33), (50,))
    assert batch.texts == ("7 12 33", "50")
    assert batch.size == 2
    free = adapter.free(batch)
    assert free.shape == adapter.input(batch).shape
    assert free.sum().item() == 8 * adapter.width


def test_left_padding_moves_the_text():
    adapter, _ = make("gpt2", size=1)
    batch = adapter.batch([[7, 12, 33], [50, 9]], padding_side="left")
    assert batch.inputs["input_ids"].tolist() == [[7, 12, 33], [0, 50, 9]]
    assert batch.layout["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.targets.tolist() == [[7, 12, 33], [IGNORE, IGNORE, 9]]  # nothing is predicted from padding
    assert not adapter.free(batch)[1, 0].any()


def test_examples_may_be_tensors_or_a_generator():
    adapter, expected = make("gpt2", size=2)
    for examples in ((s for s in SEQUENCES[:2]), [torch.tensor(s) for s in SEQUENCES[:2]]):
        assert torch.equal(adapter.batch(examples).inputs["input_ids"], expected.inputs["input_ids"])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([""], "text 0 is empty"),
        (["7 8", " \n\t "], "text 1 is empty"),
        ("7 8", "expected a list of texts, got one str"),
        (b"7 8", "got one bytes"),
        ([], "non-empty"),
        (None, "got one NoneType"),
        (7, "got one int"),
        ([float("nan")], "example 0 is neither a text nor"),
        ([[7, 8], None], "example 1 is neither a text nor"),
        ([[7.5, 8.0]], "neither a text nor"),
        ([["7", "8"]], "neither a text nor"),
        ([[]], "no token besides special"),
        ([[1, 2]], "no token besides special"),
        ([[1, 7, 60, 2]], "token id 60, but the embedding table has 60 rows"),
        ([[1, -7, 2]], "token id -7"),
        ([[1, *range(6, 6 + POSITIONS), 2]], f"{POSITIONS + 2} tokens, the model has {POSITIONS} positions"),
    ],
)
def test_bad_examples_are_refused(examples, message):
    with pytest.raises(DataError, match=message):
        bert().batch(examples, [0] * len(examples) if isinstance(examples, list) else [0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels="),
        ([0], "1 labels for 2 examples"),
        ([0, 1, 2], "3 labels for 2 examples"),
        ([0, 3], "label 3 is out of range: this model has classes 0 to 2"),
        ([0, -1], "label -1 is out of range"),
        ([True, False], "integers"),
        ([0.0, 1.0], "integers"),
        (["a", "b"], "integers"),
        ([0, None], "integers"),
        (torch.tensor([0.0, 1.0]), "integers"),
        (torch.tensor([True, False]), "integers"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        bert().batch(["7 8", "9 10"], labels)


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm"])
def test_labels_of_a_language_model_are_refused(name):
    adapter, _ = make(name, size=1)
    with pytest.raises(DataError, match="drop labels="):
        adapter.batch(SEQUENCES[:1], [0])


@pytest.mark.parametrize("labels", [torch.tensor([2, 1]), np.array([2, 1]), (2, 1), iter([2, 1])])
def test_labels_may_be_any_sequence_of_integers(labels):
    targets = bert().batch(["7 8", "9 10"], labels).targets
    assert targets.tolist() == [2, 1]
    assert targets.dtype == torch.long


@pytest.mark.parametrize("name", FAMILIES)
def test_the_longest_text_is_as_long_as_the_positions(name):
    """The limit is what the model can run, RoBERTa's two reserved rows included, not one token less or more."""
    adapter, _ = make(name, size=1)
    labels = [0] if adapter.task == "sequence-classification" else None
    assert adapter.max_positions() == POSITIONS
    longest = [6 + i % 50 for i in range(POSITIONS)]
    assert adapter.batch([longest], labels).inputs["input_ids"].shape == (1, POSITIONS)
    with pytest.raises(DataError, match=f"the model has {POSITIONS} positions"):
        adapter.batch([[*longest, 7]], labels)
    assert adapter.batch([[*longest, 7]], labels, max_length=POSITIONS).inputs["input_ids"].shape == (1, POSITIONS)


@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 40])
def test_truncation_keeps_the_closing_special_token(max_length):
    batch = bert().batch(["7 12 33"], [0], max_length=max_length)
    expected = [1, 7, 12, 33, 2] if max_length >= 5 else [1, *[7, 12, 33][: max_length - 2], 2]
    assert batch.inputs["input_ids"].tolist() == [expected]


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_length_that_cannot_be_is_refused(max_length):
    with pytest.raises(DataError, match="max_length must be at least 1"):
        bert().batch(["7 12 33"], [0], max_length=max_length)


def test_truncation_to_nothing_private_is_refused():
    with pytest.raises(DataError, match="no token besides special"):
        bert().batch(["7 12 33"], [0], max_length=2)


def test_a_padding_side_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="'right' or 'left', got 'both'"):
        bert().batch(["7 8"], [0], padding_side="both")


def test_texts_need_a_tokenizer():
    adapter, _ = make("gpt2")
    with pytest.raises(DataError, match="no tokenizer; pass tokenizer="):
        adapter.batch(["7 8"])


def test_one_token_has_no_causal_loss():
    adapter, _ = make("gpt2")
    with pytest.raises(DataError, match="needs two"):
        adapter.batch([[7, 8], [9]])


def test_a_padding_token_at_the_end_of_a_text_is_noticed():
    """A GPT-2 classifier finds the last token by id; embeddings cannot say the same, so this text is refused."""
    adapter, _ = make("gpt2-classifier")  # the usual check has passed
    with pytest.raises(UnsupportedModelError, match="padding token inside a text"):
        adapter.batch([[7, 8, 9, 0]], [1])
    assert adapter.batch([[7, 0, 9, 8]], [1]).size == 1  # inside it does no harm


class TestMaskedLanguageModel:
    def test_at_least_one_position_per_text_and_no_special_token_is_masked(self):
        adapter = bert("masked-lm")
        texts = ["7", "9 10", "20 21 22", " ".join(str(i) for i in range(20, 40))]
        for seed in range(10):
            batch = adapter.batch(texts, seed=seed)
            ids, targets = batch.inputs["input_ids"], batch.targets
            chosen = targets != IGNORE
            assert (chosen.sum(-1) >= 1).all()
            assert (ids[chosen] == MASK_TOKEN).all()
            assert not torch.isin(targets[chosen], torch.tensor([0, 1, 2])).any()
            assert (batch.layout["attention_mask"][chosen] == 1).all()
            restored = torch.where(chosen, targets, ids)
            assert [restored[3][1:21].tolist()] == [list(batch.token_ids[3])]
        assert batch.token_ids[:2] == ((7,), (9, 10))  # the reference is the text before masking

    def test_the_share_of_masked_positions_is_that_of_the_paper(self):
        adapter = bert("masked-lm")
        text = " ".join(str(6 + i) for i in range(POSITIONS - 2))
        counts = [(adapter.batch([text] * 4, seed=s).targets != IGNORE).sum().item() for s in range(50)]
        share = sum(counts) / (50 * 4 * (POSITIONS - 2))
        # 15 %, and one position where chance chose none (0.85^22 = 3 %): 4400 draws, standard error 0.5 %.
        assert share == pytest.approx(0.15 + 0.85**22 / 22, abs=0.02)

    def test_the_mask_is_chosen_by_the_seed(self):
        adapter = bert("masked-lm")
        texts = [" ".join(str(i) for i in range(20, 40))] * 2
        one, again, other = (adapter.batch(texts, seed=s) for s in (1, 1, 2))
        assert torch.equal(one.targets, again.targets)
        assert not torch.equal(one.targets, other.targets)

    def test_a_mask_token_is_needed(self):
        _, model = build("bert-mlm")
        with pytest.raises(DataError, match="needs a tokenizer with a mask token"):
            adapt(model, task="masked-lm").batch(SEQUENCES)

    def test_a_tokenizer_without_special_tokens_will_do(self):
        class Plain(IdTokenizer):
            all_special_ids = [MASK_TOKEN]  # noqa: RUF012

        _, model = build("bert-mlm")
        batch = adapt(model, tokenizer=Plain(), task="masked-lm").batch(SEQUENCES)
        assert (batch.targets != IGNORE).any(-1).all()


class TestTokens:
    def test_decode_drops_special_tokens(self):
        adapter = bert()
        assert adapter.decode([1, 7, 12, 2, 0, 0]) == "7 12"
        assert adapter.decode(torch.tensor([1, 2])) == ""

    def test_decode_without_a_tokenizer_writes_the_ids(self):
        adapter, _ = make("gpt2")
        assert adapter.decode([7, 0, 9]) == "7 0 9"
        assert adapter.token_strings([7, 9]) == ["7", "9"]

    def test_one_display_string_per_token(self):
        adapter = bert()
        assert adapter.token_strings([1, 7, 2]) == ["1", "7", "2"]

    def test_the_mask_token_is_text_and_the_closing_token_is_not(self):
        assert bert().special_ids() == {0, 1, 2}

    def test_nearest_tokens_of_table_rows_are_themselves(self):
        adapter, _ = make("gpt2")
        table = adapter.table()
        assert torch.equal(adapter.nearest_tokens(3.0 * table), torch.arange(60))
        assert torch.equal(adapter.nearest_tokens(table.reshape(6, 10, -1)), torch.arange(60).reshape(6, 10))

    def test_a_zero_row_of_the_table_is_never_nearest(self):
        _, model = build("gpt2")
        with torch.no_grad():
            model.transformer.wte.weight[0] = 0
        adapter = adapt(model, task="causal-lm")
        x = -adapter.table()  # far from every row: a zero row would win with similarity 0
        nearest = adapter.nearest_tokens(x)
        assert (nearest != 0).all()
        assert adapter.nearest_tokens(torch.zeros(2, 16, dtype=torch.float64)).tolist() == [1, 1]


def test_the_revealed_layout_holds_no_private_token():
    """Two batches that differ in their text alone give the attacker the same public facts."""
    adapter, _ = make("bert")
    first, second = (
        capture_gradient(adapter, adapter.batch(s, LABELS[:2]))
        for s in ([[7, 8, 9], [10, 11]], [[30, 31, 32], [7, 8]])
    )
    assert first.layout.keys() == second.layout.keys() == {"attention_mask", "token_type_ids"}
    assert all(torch.equal(first.layout[key], second.layout[key]) for key in first.layout)
