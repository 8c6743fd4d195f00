"""Train the two small reference models that the package ships, from text that the package writes itself.

    accelerate launch --num_processes 1 --cpu recipes/train_reference_models.py \
        --config configs/train_reference_models/bert.yaml

The same configuration gives the same weights, bit for bit, on the same machine with the same library
versions and thread count. Two to four minutes each on one core.
"""

import itertools
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import accelerate
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lmleak.config import parse_config
from lmleak.data.embedded import LABELS, Message, messages, sample_messages
from lmleak.data.embedded.vocabulary import train_byte_level_bpe, train_wordpiece
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status
from lmleak.types import IGNORE

Loss = Callable[[PreTrainedModel, Mapping[str, Tensor]], Tensor]


@dataclass
class TrainReferenceModels:
    """One reference model: its shape, its text and its training."""

    model_type: Literal["bert", "gpt2"] = "bert"
    """"bert": a topic classifier, pretrained as a masked language model; "gpt2": a language model."""
    output: str = "runs/reference-bert"
    """Directory to write."""
    seed: int = 0
    """Seed of the text, the initial weights, the order, the masks and the dropout."""
    vocab_size: int = 2000
    """Entries of the tokenizer, special tokens included."""
    hidden_size: int = 128
    """Width D of the embeddings."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads per block."""
    intermediate_size: int = 512
    """Width of the feed-forward layers."""
    positions: int = 64
    """Longest input, in tokens."""
    num_messages: int = 12000
    """Messages to train on."""
    num_held_out: int = 1000
    """Messages to measure quality on; those that also occur in the training text are dropped."""
    batch_size: int = 32
    """Messages per step."""
    mlm_steps: int = 2000
    """Masked-language-model steps before the classifier is trained ("bert" only)."""
    mlm_learning_rate: float = 1e-3
    """Peak of their learning rate."""
    steps: int = 350
    """Steps on the task itself."""
    learning_rate: float = 4e-4
    """Peak of its learning rate, reached after a tenth of the steps, then a cosine down to zero."""
    weight_decay: float = 0.01
    """Of AdamW."""
    dropout: float = 0.1
    """While training; also written to the model's config."""
    label_smoothing: float = 0.3
    """Of the classifier. Certain of everything, it would share gradients too small for a useful audit."""
    threads: int = 1
    """Torch threads; sums in another order give other last bits."""

    def __post_init__(self):
        if self.hidden_size % self.heads:
            raise ConfigError(f"hidden_size={self.hidden_size} is no multiple of heads={self.heads}.")


def main(args: TrainReferenceModels) -> dict:
    """Train one reference model, save it, and return what its model card says."""
    accelerator = start(args)
    with torch.random.fork_rng(devices=[]):  # weights and dropout draw from the global generator
        torch.manual_seed(args.seed)
        training, held_out = write_text(args)
        tokenizer = train_tokenizer(args, [message.text for message in training])
        model = build_model(args, tokenizer)
        losses = train(args, accelerator, model, tokenizer, training)
        card = save(args, model, tokenizer, losses | measure(model, tokenizer, held_out))
    accelerator.print(json.dumps(card["results"], indent=2))
    return card


def start(args: TrainReferenceModels) -> Accelerator:
    """Set the thread count and refuse more than one process, whose batches would give other weights."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    if accelerator.num_processes != 1:
        raise ConfigError(
            f"got {accelerator.num_processes} processes, expected 1: the reference models are reproducible "
            "only from one process. Write: accelerate launch --num_processes 1 --cpu ..."
        )
    torch.set_num_threads(args.threads)
    return accelerator


def write_text(args: TrainReferenceModels) -> tuple[list[Message], list[Message]]:
    """Write the training and the held-out messages, with no text in both."""
    training = messages(args.num_messages, seed=args.seed)
    seen = {message.text for message in training}
    return training, [m for m in messages(args.num_held_out, seed=args.seed + 1) if m.text not in seen]


def train_tokenizer(args: TrainReferenceModels, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer that the model's family would have, on the training text."""
    kinds = {"bert": train_wordpiece, "gpt2": train_byte_level_bpe}
    return kinds[args.model_type](texts, args.vocab_size, args.positions)


def build_model(args: TrainReferenceModels, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the model with initial weights from the global generator."""
    if args.model_type == "bert":
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=args.intermediate_size,
            max_position_embeddings=args.positions,
            hidden_dropout_prob=args.dropout,
            attention_probs_dropout_prob=args.dropout,
            id2label=dict(enumerate(LABELS)),
            label2id={name: i for i, name in enumerate(LABELS)},
            pad_token_id=tokenizer.pad_token_id,
        )
        return BertForSequenceClassification(config)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=args.hidden_size,
        n_layer=args.layers,
        n_head=args.heads,
        n_inner=args.intermediate_size,
        n_positions=args.positions,
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def train(
    args: TrainReferenceModels,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    training: list[Message],
) -> dict[str, float]:
    """Train in one stage (gpt2) or two (bert: masked words, then topics); return the final losses."""
    batches = batches_of(args, encode(tokenizer, training), tokenizer.pad_token_id)
    run = partial(optimise, accelerator, batches, args.weight_decay)
    if args.model_type == "gpt2":
        return {"training_loss": run(model, causal_lm_loss, args.steps, args.learning_rate)}
    masked_lm = BertForMaskedLM(model.config)
    masked_lm.bert = model.bert  # BertForMaskedLM never calls the pooler, which keeps its initial weights
    masked_lm.tie_weights()
    masks = masked_lm_loss(tokenizer, torch.Generator().manual_seed(args.seed))
    topics = classification_loss(args.label_smoothing)
    return {
        "masked_lm_loss": run(masked_lm, masks, args.mlm_steps, args.mlm_learning_rate),
        "training_loss": run(model, topics, args.steps, args.learning_rate),
    }


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Message]) -> list[tuple[list[int], int]]:
    """Tokenize to (ids, label); text for a language model gets the ends that its tokenizer does not add."""
    rows = tokenizer([message.text for message in texts])["input_ids"]
    if tokenizer.cls_token is None:
        # Half start with <|endoftext|>, to write from nothing; half with a word, to read text as it stands.
        end = [tokenizer.eos_token_id]
        rows = [(end if i % 2 else []) + row + end for i, row in enumerate(rows)]
    return [(row[: tokenizer.model_max_length], message.label) for row, message in zip(rows, texts, strict=True)]


def batches_of(args: TrainReferenceModels, rows: list, pad: int) -> Iterator[dict[str, Tensor]]:
    """Shuffled batches without end, padded to the longest row of each."""
    order = torch.Generator().manual_seed(args.seed)
    pad_rows = lambda rows: collate(rows, pad)
    loader = DataLoader(rows, args.batch_size, shuffle=True, drop_last=True, generator=order, collate_fn=pad_rows)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def collate(rows: list[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    """Pad (ids, label) rows to a batch: input_ids and attention_mask (B, T), labels (B,)."""
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([label for _, label in rows]),
    }


def optimise(
    accelerator: Accelerator,
    batches: Iterator[dict[str, Tensor]],
    weight_decay: float,
    model: PreTrainedModel,
    loss_of: Loss,
    steps: int,
    learning_rate: float,
) -> float:
    """Take ``steps`` of AdamW with warm-up, cosine decay and clipping; return the last tenth's mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    tenth = max(1, steps // 10)
    rate = lambda step: min((step + 1) / tenth, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer, scheduler = accelerator.prepare(model.train(), optimizer, scheduler)
    progress = accelerate.utils.tqdm(range(steps), desc=type(model).__name__, mininterval=5)
    losses = []
    for _ in progress:
        loss = loss_of(model, next(batches))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return sum(losses[-tenth:]) / max(1, len(losses[-tenth:]))


def causal_lm_loss(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy of the next token, padding (which shares its id with the end of text) left out."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)[:, 1:]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def masked_lm_loss(tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> Loss:
    """Mean cross entropy of hidden tokens: 20 % of the words' tokens, every one of them shown as [MASK]."""
    special = torch.tensor(tokenizer.all_special_ids)

    def loss_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        hidden = (torch.rand(ids.shape, generator=generator) < 0.2) & ~torch.isin(ids, special)
        shown = ids.masked_fill(hidden, tokenizer.mask_token_id)
        states = model.bert(input_ids=shown, attention_mask=batch["attention_mask"]).last_hidden_state
        return cross_entropy(model.cls(states[hidden]), ids[hidden])  # logits only where they are needed

    return loss_of


def classification_loss(label_smoothing: float) -> Loss:
    """Mean cross entropy of the topic, against targets that keep ``label_smoothing`` for the other topics."""

    def loss_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return cross_entropy(logits, batch["labels"], label_smoothing=label_smoothing)

    return loss_of


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held_out: list[Message]) -> dict[str, float]:
    """Measure held-out loss and accuracy, and the gradient that each sample message would share."""
    model.eval()
    rows, samples = encode(tokenizer, held_out), encode(tokenizer, sample_messages())
    batch = collate(rows, tokenizer.pad_token_id)
    classifies = isinstance(model, BertForSequenceClassification)
    loss_of = classification_loss(0.0) if classifies else causal_lm_loss
    with torch.no_grad():
        results = {"held_out_loss": loss_of(model, batch).item()}
        results["uniform_loss"] = math.log(len(LABELS) if classifies else len(tokenizer))
        results["sample_loss"] = loss_of(model, collate(samples, tokenizer.pad_token_id)).item()
        if classifies:
            results["held_out_accuracy"] = accuracy(model, batch)
            results["sample_accuracy"] = accuracy(model, collate(samples, tokenizer.pad_token_id))
    norms = [gradient_norm(model, loss_of(model, collate([row], tokenizer.pad_token_id))) for row in samples]
    results["sample_gradient_norm_mean"] = sum(norms) / len(norms)
    results["sample_gradient_norm_median"] = statistics.median(norms)
    results["sample_gradient_norm_least"] = min(norms)
    return results


def accuracy(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> float:
    """Share of messages whose likeliest topic is right."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return (logits.argmax(-1) == batch["labels"]).float().mean().item()


def gradient_norm(model: PreTrainedModel, loss: Tensor) -> float:
    """Euclidean norm of the gradient of ``loss`` with respect to every trained parameter."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return math.sqrt(sum(gradient.square().sum().item() for gradient in gradients if gradient is not None))


def save(
    args: TrainReferenceModels,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    results: Mapping[str, float],
) -> dict:
    """Write the model, the tokenizer and ``training.json``, the card from which the run can be repeated."""
    folder = Path(args.output)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only, but shipped to everyone
    tokenizer.save_pretrained(folder)
    card = {
        "recipe": "recipes/train_reference_models.py",
        "text": "written by lmleak.data.embedded.messages; every name, place and number is invented",
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": {name: value for name, value in asdict(args).items() if name != "output"},
        "results": {name: round(value, 4) for name, value in results.items()},
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, transformers, tokenizers, accelerate)},
        },
    }
    (folder / "training.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


@exit_status
def command(argv: list[str]) -> None:
    """Train as the arguments say; exit status 2 if the input is refused."""
    main(parse_config(TrainReferenceModels, argv, prog="train_reference_models.py"))


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
