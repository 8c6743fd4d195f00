"""Tiny random models of every supported family, built from configurations without any download, and of images."""

import torch
import transformers as tf

VOCABULARY, WIDTH, POSITIONS = 60, 16, 24
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0,
}  # fmt: skip
LLAMA = ENCODER | {"num_key_value_heads": 1, "max_position_embeddings": POSITIONS}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
DISTILBERT = {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
              "max_position_embeddings": POSITIONS, "num_labels": 3}  # fmt: skip
OPT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "num_hidden_layers": 2,
       "num_attention_heads": 2, "ffn_dim": 32, "max_position_embeddings": POSITIONS, "pad_token_id": 1}  # fmt: skip
BERT = ENCODER | {"max_position_embeddings": POSITIONS, "num_labels": 3}

# name -> (task, model class, config)
FAMILIES = {
    "bert": ("sequence-classification", tf.BertForSequenceClassification, lambda: tf.BertConfig(**BERT)),
    "bert-mlm": ("masked-lm", tf.BertForMaskedLM, lambda: tf.BertConfig(**BERT)),
    "distilbert": ("sequence-classification", tf.DistilBertForSequenceClassification,
                   lambda: tf.DistilBertConfig(**DISTILBERT)),
    "roberta": ("sequence-classification", tf.RobertaForSequenceClassification,
                lambda: tf.RobertaConfig(**BERT | {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2})),
    "gpt2": ("causal-lm", tf.GPT2LMHeadModel, lambda: tf.GPT2Config(**GPT2)),
    "gpt2-untied": ("causal-lm", tf.GPT2LMHeadModel, lambda: tf.GPT2Config(**GPT2, tie_word_embeddings=False)),
    "gpt2-classifier": ("sequence-classification", tf.GPT2ForSequenceClassification,
                        lambda: tf.GPT2Config(**GPT2, num_labels=3)),
    "opt": ("causal-lm", tf.OPTForCausalLM, lambda: tf.OPTConfig(**OPT)),
    "gpt-neox": ("causal-lm", tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(
        **ENCODER | {"max_position_embeddings": POSITIONS, "bos_token_id": 1, "eos_token_id": 1})),
    "llama": ("causal-lm", tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**LLAMA)),
    "llama-tied": ("causal-lm", tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    # No entry in lmleak.adapters.families: the generic defaults must do.
    "unlisted-gemma": ("causal-lm", tf.GemmaForCausalLM, lambda: tf.GemmaConfig(**LLAMA | {"head_dim": 8})),
    "unlisted-electra": ("sequence-classification", tf.ElectraForSequenceClassification,
                         lambda: tf.ElectraConfig(**BERT | {"embedding_size": WIDTH})),
}  # fmt: skip
MASK_TOKEN = 5
# Unequal lengths; ids above the special ones.
SEQUENCES = [[7, 12, 33, 41, 20, 9], [50, 8, 17, 28], [30, 11, 44, 19, 25]]
LABELS = [0, 2, 1]


class IdTokenizer:
    """The little that an adapter asks of a tokenizer, on a vocabulary of numbers."""

    pad_token_id, mask_token_id, unk_token_id, eos_token_id = 0, MASK_TOKEN, None, None
    all_special_ids = [0, MASK_TOKEN]  # noqa: RUF012 (a constant of a test double)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return " ".join(map(str, ids))


def build(name: str, *, dtype=torch.float64, seed: int = 0, scale: float = 1.0):
    """Return (task, model): a tiny random model in evaluation mode; ``scale`` multiplies its weights."""
    task, model_class, config = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config()).to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():  # larger than the usual 0.02, so that nothing is nearly linear
                p.add_(torch.randn_like(p) * 0.1 * scale)
    return task, model


def make(name: str, *, size: int = 3, padding_side: str = "right", dtype=torch.float64, **keywords):
    """Return (adapter, batch) of a tiny family model on the unequal sequences."""
    from lmleak.adapters import adapt

    task, model = build(name, dtype=dtype, **keywords)
    adapter = adapt(model, tokenizer=IdTokenizer() if task == "masked-lm" else None, task=task)
    labels = LABELS[:size] if task == "sequence-classification" else None
    return adapter, adapter.batch(SEQUENCES[:size], labels, padding_side=padding_side)


def image_problem(model, shape=(2, 3, 8, 8), dtype=torch.float64):
    """Return (adapter, batch) of two random images and the classifier that ``model()`` makes, its weights shifted."""
    from lmleak.adapters import adapt

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model().to(dtype).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.randn_like(tensor))
                if "running_var" in name:
                    tensor.abs_().add_(0.5)
    adapter = adapt(model, task="image-classification")
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return adapter, adapter.batch(images, [0, 1])
