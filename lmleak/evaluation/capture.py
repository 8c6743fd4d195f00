"""``lmleak capture``: the gradient that a client would send, as a file, and apart from it what it must not send."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lmleak.adapters import TextAdapter, VisionAdapter
from lmleak.data import load_images
from lmleak.defenses import NoDefense, derived_seed, parse_defense
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.image_records import ImageRecords
from lmleak.evaluation.labels import batch_labels, named_texts
from lmleak.evaluation.model import ModelConfig, load_model
from lmleak.evaluation.records import file_digest, json_lines, text_record
from lmleak.evaluation.scored import DROPOUT_STREAM, seeded_batch
from lmleak.files import refuse_unwritable, write_text_atomically
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.types import Aggregation, Batch, TextBatch

TEXT_ONLY = ("texts", "labels", "text_column", "max_length", "padding_side", "reveal_lengths")
IMAGE_ONLY = ("image_size",)


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(ModelConfig):
    """Write the gradient of one private batch to a file, as a client would send it."""

    data: str | None = None
    """Texts: a .txt, .csv, .tsv, .jsonl or .parquet file, or a datasets id; the embedded samples if not given. Images:
    digits (scikit-learn's, if not given), MNIST idx files, a .npz, .zip, folder of class folders, or a datasets id."""
    texts: list[str] = field(default_factory=list)
    """Texts given here instead of data."""
    labels: list[int] = field(default_factory=list)
    """Their classes, for a classifier."""
    text_column: str | None = None
    """Column that holds the text; a number in a file without a header."""
    label_column: str | None = None
    """Column that holds the class, for a classifier."""
    split: str | None = None
    """Split of a datasets id; of images also train or t10k of MNIST, or the folder above those of the classes."""
    image_size: int | None = None
    """Images: resize to this height and width."""
    batch_size: int | None = None
    """Texts or images in the batch, over all clients and steps; 1 if not given, or all of texts."""
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
    """The private reference for lmleak score, never to be sent; if not given, OUTPUT.private-reference.jsonl, or
    .safetensors for images."""

    def __post_init__(self):
        if self.data and self.texts:
            raise ConfigError("give data= or texts=, not both")
        if self.labels and len(self.labels) != len(self.texts):
            raise ConfigError(f"got {len(self.labels)} labels for {len(self.texts)} texts")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.index < 0:
            raise ConfigError(f"index counts batches from 0, got {self.index}")
        if self.reference and Path(self.reference).absolute() == Path(self.output).absolute():
            raise ConfigError(f"output and reference both name {self.output!r}; the reference must stay private")
        parse_defense(self.defenses)
        _ = self.aggregation

    def reference_path(self, suffix: str) -> Path:
        """Return where the private reference goes, a file of the given suffix unless the settings name it."""
        return Path(self.reference or self.output.removesuffix(".safetensors") + ".private-reference" + suffix)

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

    Raises:
        ConfigError: If a setting is for the other kind of data, among others.
    """
    refuse_unwritable(config.output, "output")
    adapter = load_model(config)
    of_images = isinstance(adapter, VisionAdapter)
    _refuse_options(config, of_images)
    path = config.reference_path(".safetensors" if of_images else ".jsonl")
    if of_images and path.suffix != ".safetensors":
        raise ConfigError(f"reference={str(path)!r}: images are kept in a .safetensors file; name one")
    refuse_unwritable(path, "reference")
    if of_images:
        batch, labels = private_images(config, adapter), None
    else:
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
    gradient = shared.save(config.output)
    digest = file_digest(gradient)
    if of_images:
        x = adapter.input(batch).double()
        ImageRecords(adapter.normalization.pixels(x), batch.targets, adapter.normalization, digest).save(path)
    else:
        rows = [text_record(*pair, adapter) for pair in zip(batch.texts, batch.token_ids, strict=True)]
        more = [{"label": label, "gradient": digest} for label in labels or [None] * len(rows)]
        write_text_atomically(path, json_lines(row | facts for row, facts in zip(rows, more, strict=True)))
    return CaptureResult(shared, gradient, path, seeded=defense.random or config.dropout)


def _refuse_options(config: CaptureConfig, of_images: bool) -> None:
    """Refuse settings of texts for a model of images, and the other way round."""
    defaults = CaptureConfig(model=config.model)
    for name in TEXT_ONLY if of_images else IMAGE_ONLY:
        if getattr(config, name) != getattr(defaults, name):
            kinds = ("texts", "images") if of_images else ("images", "texts")
            raise ConfigError(f"{name}= is for {kinds[0]}, and {config.model!r} classifies {kinds[1]}; drop it")


def private_images(config: CaptureConfig, adapter: VisionAdapter) -> Batch:
    """Return the batch of images that the settings name.

    Args:
        config: The settings.
        adapter: The model.

    Returns:
        The batch, normalised as the model reads it.

    Raises:
        DataError: If the data hold no such batch, or images of another shape than the model reads.
    """
    size = config.batch_size or 1
    start, stop = config.index * size, (config.index + 1) * size
    data = load_images(
        config.data or "digits", split=config.split, size=config.image_size, limit=stop,
        label_column=config.label_column,
    )  # fmt: skip
    if len(data) < stop:
        raise DataError(
            f"batch {config.index} of size {size} needs {stop} images, but {data.name} holds {len(data)}; give a "
            "smaller index= or batch_size="
        )
    shape = adapter.image_shape
    if data.image_shape != shape:
        same = data.image_shape[0] == shape[0] and shape[1] == shape[2]
        remedy = f"write image_size={shape[1]}, or " if same else ""
        raise DataError(
            f"{data.name} holds images of shape {data.image_shape}, and {adapter.name} reads {shape}; {remedy}give a "
            "shape file (.yaml: architecture, image_shape, num_classes, normalization) as model=, here and in attack"
        )
    return adapter.batch(adapter.normalization.normalize(data.pixels[start:]), data.labels[start:])


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
    examples = named_texts(config, stop)
    if len(examples.texts) < stop:
        raise DataError(
            f"batch {config.index} of size {size} needs {stop} examples, but {examples.origin} holds "
            f"{len(examples.texts)}; give a smaller index= or batch_size="
        )
    labels = batch_labels(examples, adapter, given=config.labels)
    labels = None if labels is None else labels[start:stop]
    batch = seeded_batch(
        adapter, examples.texts[start:stop], labels, max_length=config.max_length, padding_side=config.padding_side,
        seed=config.seed,
    )  # fmt: skip
    return batch, labels
