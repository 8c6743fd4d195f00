"""Two small tokenizers, trained so that the same text always gives the same vocabulary."""

from collections import Counter
from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lmleak.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
BERT_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# What a keyboard writes, lower-cased: no message in plain English needs [UNK].
PRINTABLE = "".join(sorted({chr(code).lower() for code in range(33, 127)}))


def train_wordpiece(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a lower-case tokenizer of the BERT kind: ``[CLS] text [SEP]``, words split into known pieces.

    Args:
        texts: Training text.
        vocab_size: Entries, the five special tokens included.
        max_length: Longest input of the model, in tokens.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    lower_case = map(tokenizer.normalizer.normalize_str, texts)
    words = Counter(word for text in lower_case for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    special = list(BERT_SPECIAL.values())
    entries = special + wordpieces(words, vocab_size - len(special))
    tokenizer.model = WordPiece({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, entries.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **BERT_SPECIAL)


def wordpieces(words: Mapping[str, int], size: int) -> list[str]:
    """Choose a WordPiece vocabulary: every character, common word endings, the commonest whole words.

    The trainer in ``tokenizers`` numbers its alphabet in the order of a hash map, so its vocabulary differs
    from process to process. Here ties are alphabetical.

    Args:
        words: How often each word occurs.
        size: Entries to choose. A tenth are endings of 2 to 4 letters, ranked by how many different words
            they end.

    Returns:
        At most ``size`` distinct entries; pieces that continue a word start with "##".

    Raises:
        ConfigError: If the characters alone need more than ``size`` entries.
    """
    characters = sorted(set(PRINTABLE).union(*words))
    alphabet = characters + [f"##{character}" for character in characters if character.isalnum()]
    if len(alphabet) > size:
        raise ConfigError(
            f"a WordPiece vocabulary of {size} entries has no room for {len(alphabet)} single characters. "
            f"Write vocab_size={2 * len(alphabet)} or more."
        )
    endings = Counter(f"##{word[-n:]}" for word in words if word.isalpha() for n in (2, 3, 4) if len(word) > n)
    pieces = alphabet + _commonest(endings, min(size // 10, size - len(alphabet)))
    whole = Counter({word: count for word, count in words.items() if len(word) > 1})
    return pieces + _commonest(whole, size - len(pieces))


def _commonest(counts: Counter[str], number: int) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[:number]


def train_byte_level_bpe(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of the GPT-2 kind: byte-level pairs, no token added, ``<|endoftext|>`` also pads.

    Args:
        texts: Training text.
        vocab_size: Entries, the 256 bytes and ``<|endoftext|>`` included.
        max_length: Longest input of the model, in tokens.

    Returns:
        The tokenizer; decoding gives back any text exactly.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT),
    )
