"""``lmleak capture``: the gradient that a client would send, as a file, and apart from it what it must not send."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lmleak.adapters import TextAdapter
from lmleak.data import Examples, load_examples
from lmleak.defenses import NoDefense, derived_seed, parse_defense
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.labels import batch_labels
from lmleak.evaluation.model import ModelConfig, load_text_model
from lmleak.evaluation.records import file_digest, json_lines, text_record
from lmleak.evaluation.scored import DROPOUT_STREAM, MASK_STREAM
from lmleak.files import refuse_unwritable, write_text_atomically
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.types import Aggregation, TextBatch


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(ModelConfig):
    """Write the gradient of one private batch to a file, as a client would send it."""

    data: str | None = None
    """A .txt, .csv, .tsv, .jsonl or .parquet file, or a datasets id; the embedded samples if not given."""
    texts: list[str] = field(default_factory=list)
    """Texts given here instead of data."""
    labels: list[int] = field(default_factory=list)
    """Their classes, for a classifier."""
    text_column: str | None = None
    """Column that holds the text; a number in a file without a header."""
    label_column: str | None = None
    """Column that holds the class, for a classifier."""
    split: str | None = None
    """Split of a datasets id."""
    batch_size: int | None = None
    """Texts in the batch, over all clients and steps; 1 if not given, or all of texts."""
    index: int = 0
    """Which batch of the data, counted from 0."""
    max_length: int | None = None
    """Truncate texts to this many tokens; too long texts are refused otherwise."""
    padding_side: Literal["right", "left"] = "right"
    """Side on which shorter texts of a batch are padded."""
    shared: str = "no-word-embeddings"
    """Parameters whose gradient is shared: all, no-word-embeddings, embeddings, block:0-3, head, lora or a regex."""
    clients: int = 1
    """Clients whose updates are averaged."""
    epochs: int = 1
    """Local passes of a client over its share (FedAvg)."""
    steps_per_epoch: int = 1
    """Local SGD steps per pass."""
    learning_rate: float | None = None
    """Of the local steps; needed if there are several."""
    dropout: bool = False
    """Leave the model's dropout on, as in training."""
    defenses: str = "none"
    """Defenses applied in order, one chain: "clip(max_norm=1)+gaussian(std=0.01)"."""
    reveal_lengths: bool = True
    """Tell the server lengths and padding, which matching attacks need."""
    reveal_labels: bool = True
    """Tell the server the class labels, likewise."""
    seed: int = 0
    """Seed of noise, dropout and masked positions; whoever knows it can subtract the noise."""
    output: str = "gradient.safetensors"
    """The gradient file."""
    reference: str | None = None
    """The private reference for lmleak score, never to be sent; if not given, OUTPUT.private-reference.jsonl."""

    def __post_init__(self):
        if self.data and self.texts:
            raise ConfigError("give data= or texts=, not both")
        if self.labels and len(self.labels) != len(self.texts):
            raise ConfigError(f"got {len(self.labels)} labels for {len(self.texts)} texts")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.index < 0:
            raise ConfigError(f"index counts batches from 0, got {self.index}")
        if self.reference_path.absolute() == Path(self.output).absolute():
            raise ConfigError(f"output and reference both name {self.output!r}; the reference must stay private")
        parse_defense(self.defenses)
        _ = self.aggregation

    @property
    def reference_path(self) -> Path:
        """Where the private reference goes."""
        return Path(self.reference or self.output.removesuffix(".safetensors") + ".private-reference.jsonl")

    @property
    def aggregation(self) -> Aggregation:
        """How the update is formed."""
        return Aggregation(self.clients, self.epochs, self.steps_per_epoch, self.learning_rate)


@dataclass(frozen=True)
class CaptureResult:
    """What was written."""

    shared: SharedGradient
    gradient: Path
    reference: Path
    seeded: bool
    """Whether what protects the file can be undone by whoever knows or guesses the seed."""


def run_capture(config: CaptureConfig) -> CaptureResult:
    """Compute the gradient of one batch and write it, with the private reference apart from it.

    Args:
        config: The settings.

    Returns:
        What was written. Bad input is refused before anything is.
    """
    refuse_unwritable(config.output, "output")
    refuse_unwritable(config.reference_path, "reference")
    adapter = load_text_model(config)
    batch, labels = private_batch(config, adapter)
    shared = capture_gradient(
        adapter,
        batch,
        shared=config.shared,
        reveal_lengths=config.reveal_lengths,
        reveal_labels=config.reveal_labels,
        aggregation=config.aggregation,
        dropout=config.dropout,
        seed=derived_seed(config.seed, DROPOUT_STREAM),
    )
    defense = parse_defense(config.defenses, config.seed)
    if not isinstance(defense, NoDefense):
        shared = defense(shared)
    rows = [text_record(*pair, adapter) for pair in zip(batch.texts, batch.token_ids, strict=True)]
    gradient = shared.save(config.output)
    digest = {"gradient": file_digest(gradient)}
    rows = [row | {"label": label} | digest for row, label in zip(rows, labels or [None] * len(rows), strict=True)]
    reference = write_text_atomically(config.reference_path, json_lines(rows))
    return CaptureResult(shared, gradient, reference, seeded=defense.random or config.dropout)


def private_batch(config: CaptureConfig, adapter: TextAdapter) -> tuple[TextBatch, list[int] | None]:
    """Return the batch that the settings name, and its class numbers if the model is a classifier.

    Args:
        config: The settings.
        adapter: The model.

    Returns:
        The batch and the labels.

    Raises:
        DataError: If the data hold no such batch.
    """
    size = config.batch_size or len(config.texts) or 1
    start, stop = config.index * size, (config.index + 1) * size
    if config.texts:
        examples = Examples(tuple(config.texts), tuple(config.labels) or None, "texts given on the command line")
    else:
        examples = load_examples(
            config.data, text_column=config.text_column, label_column=config.label_column,
            split=config.split, limit=stop,
        )  # fmt: skip
    if len(examples.texts) < stop:
        raise DataError(
            f"batch {config.index} of size {size} needs {stop} examples, but {examples.origin} holds "
            f"{len(examples.texts)}; give a smaller index= or batch_size="
        )
    labels = batch_labels(examples, adapter, given=config.labels)
    labels = None if labels is None else labels[start:stop]
    batch = adapter.batch(
        examples.texts[start:stop],
        labels,
        max_length=config.max_length,
        padding_side=config.padding_side,
        seed=derived_seed(config.seed, MASK_STREAM) % 2**31,
    )
    return batch, labels
