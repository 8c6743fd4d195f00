"""From the settings of ``lmleak layers`` to a model and its labelled private examples."""

from collections.abc import Callable, Sequence

from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from lmleak.adapters import ARCHITECTURES, ModelAdapter, TextAdapter, VisionAdapter, load_adapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.data import Examples, load_examples
from lmleak.data.attributes import COIN, coin, text_attributes
from lmleak.data.attributes_images import inject
from lmleak.data.embedded import LABELS, messages
from lmleak.data.images import ImageData, load_images
from lmleak.errors import ConfigError, DataError, UnsupportedModelError
from lmleak.evaluation.image_study import image_adapter
from lmleak.evaluation.labels import class_numbers
from lmleak.evaluation.layers_config import LayersConfig
from lmleak.evaluation.layers_examples import LabelledExamples, image_examples, text_examples
from lmleak.evaluation.model import device_of
from lmleak.lookup import lookup

MARK = "mark"
EMBEDDED_SEED = 101  # of the embedded messages: not that of the reference models' training texts


def load_labelled(config: LayersConfig, state: PartialState) -> tuple[ModelAdapter, LabelledExamples]:
    """Load the model and the data.

    Args:
        config: The settings.
        state: This process's place, for the device.

    Returns:
        The adapter and the examples.

    Raises:
        ConfigError: If an option is not one of this kind of data.
        UnsupportedModelError: If the model reads neither texts nor images.
    """
    device = device_of(config.device, state)
    disable_progress_bar()  # of weight loading; the audit has its own
    if config.model in ARCHITECTURES:
        if config.task not in (None, IMAGE_TASK):
            raise ConfigError(f"{config.model!r} is an architecture of images; it has no task {config.task!r}")
        data = load_images(config.data or "digits", split=config.split, size=config.image_size, limit=config.samples)
        adapter = image_adapter(
            config.model, data, normalization=config.normalization, initialization=config.initialization,
            seed=config.seed, device=device,
        )  # fmt: skip
        return adapter, _images(config, adapter, data)
    adapter = load_adapter(config.model, task=config.task, tokenizer=config.tokenizer, device=device, seed=config.seed)
    if isinstance(adapter, TextAdapter):
        return adapter, _texts(config, adapter)
    if isinstance(adapter, VisionAdapter):
        data = load_images(config.data or "digits", split=config.split, size=config.image_size, limit=config.samples)
        return adapter, _images(config, adapter, data)
    raise UnsupportedModelError(f"{config.model!r} is of task {adapter.task!r}; expected a model of texts or images")


def _images(config: LayersConfig, adapter: VisionAdapter, data: ImageData) -> LabelledExamples:
    for option in ("text_column", "label_column", "attribute_column", "group_column", "max_length"):
        if getattr(config, option):
            raise ConfigError(f"{option} belongs to texts, and {config.model!r} reads images; drop it")
    wanted = config.attribute or [MARK, "parity"]
    attributes = {name: lookup("attribute", name, IMAGE_ATTRIBUTES)(data, config.seed) for name in wanted}
    pixels = inject(data.pixels, attributes[MARK], config.mark) if MARK in attributes else data.pixels
    return image_examples(adapter, pixels, data.labels, attributes, name=data.name)


def _texts(config: LayersConfig, adapter: TextAdapter) -> LabelledExamples:
    for option in ("image_size", "normalization", "initialization"):
        if getattr(config, option):
            raise ConfigError(f"{option} belongs to images, and {config.model!r} reads texts; drop it")
    if config.data is None:
        written = messages(config.samples, seed=EMBEDDED_SEED)
        names = tuple(LABELS[message.label] for message in written)
        examples, columns = Examples(tuple(m.text for m in written), names, "embedded messages"), {}
        if config.attribute_column or config.group_column:
            raise ConfigError("attribute_column and group_column name columns of data=, which is not given")
    else:
        examples = _column(config, config.label_column)
        columns = {name: _values(config, name) for name in config.attribute_column}
    wanted = config.attribute or ([] if columns else ["number", "label"] if examples.labels else ["number"])
    for name in wanted:
        columns[name] = _text_attribute(name, examples, config.seed)
    labels = None
    if adapter.task == "sequence-classification":
        labels = class_numbers(examples.labels, adapter, examples.origin)
    groups = None if config.group_column is None else _values(config, config.group_column)
    return text_examples(
        adapter, examples.texts, columns, labels=labels, groups=groups, max_length=config.max_length,
        name=examples.origin,
    )  # fmt: skip


def _column(config: LayersConfig, label_column: str | None) -> Examples:
    return load_examples(
        config.data, text_column=config.text_column, label_column=label_column, split=config.split,
        limit=config.samples,
    )  # fmt: skip


def _values(config: LayersConfig, column: str) -> Sequence[int | str]:
    """Return one column of the data, all words or all numbers.

    Args:
        config: The settings.
        column: Its name.

    Returns:
        One value per text.

    Raises:
        DataError: If a value is missing.
    """
    values = _column(config, column).labels
    missing = [number for number, value in enumerate(values, 1) if value is None or value == ""]
    if missing:
        raise DataError(
            f"column {column!r} of {config.data} has no value in example {missing[0]} ({len(missing)} in all); "
            "leave those rows out, or write a word of its own such as unknown"
        )
    return values if all(isinstance(value, int) for value in values) else [str(value) for value in values]


def _class(examples: Examples) -> Sequence:
    if examples.labels is None:
        raise DataError(f"{examples.origin} has no class column to take as an attribute; pass attribute_column=")
    return list(examples.labels)


def _text_attribute(name: str, examples: Examples, seed: int) -> Sequence:
    """Return "label", "coin" (nothing: a control), or what the words of each text show by a plain rule."""
    shown = text_attributes(examples.texts)
    lookup("attribute", name, dict.fromkeys(("label", COIN, *shown)))
    if name == "label":
        return _class(examples)
    return coin(len(examples.texts), seed) if name == COIN else shown[name]


IMAGE_ATTRIBUTES: dict[str, Callable[[ImageData, int], Sequence]] = {
    "label": lambda data, seed: data.labels,
    "parity": lambda data, seed: data.labels % 2,
    MARK: lambda data, seed: coin(len(data), seed + 1),
    COIN: lambda data, seed: coin(len(data), seed),
}
"""Attributes of images: the class; whether its number is odd; a mark that is put into a random half of the images,
independently of the class; and a coin, of which nothing can be known."""
