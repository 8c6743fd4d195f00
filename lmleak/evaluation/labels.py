"""Private texts that settings name, and their labels: class numbers for a classifier, none for a language model."""

from collections.abc import Sequence
from typing import Any

from lmleak.adapters import TextAdapter
from lmleak.data import Examples, load_examples
from lmleak.errors import ConfigError, DataError
from lmleak.lookup import suggest


def named_texts(config: Any, limit: int) -> Examples:
    """Return the texts that settings name: those written in ``texts``, or else the first of ``data``.

    Args:
        config: Settings with ``texts``, ``labels``, ``data``, ``text_column``, ``label_column`` and ``split``.
        limit: Most examples read from ``data``.

    Returns:
        The texts with their labels, if they have any.
    """
    if config.texts:
        return Examples(tuple(config.texts), tuple(config.labels) or None, "texts given on the command line")
    return load_examples(
        config.data, text_column=config.text_column, label_column=config.label_column, split=config.split, limit=limit
    )


def batch_labels(examples: Examples, adapter: TextAdapter, *, given: Sequence[int]) -> list[int] | None:
    """Return the class number of every example, or None for a language model, whose targets are the text itself.

    Args:
        examples: The private texts, with labels if their source has some. A table may hold classes that a language
            model has no use for.
        adapter: The model.
        given: Labels that were written as a setting, beside the texts.

    Returns:
        The numbers.

    Raises:
        ConfigError: If labels were written for a language model.
    """
    if adapter.task == "sequence-classification":
        return class_numbers(examples.labels, adapter, examples.origin)
    if adapter.task == "token-classification":
        raise ConfigError(
            f"{adapter.name} has a label per token, which these commands cannot read; in Python: "
            "lmleak.inversion_influence(adapter, adapter.batch(texts, labels), noise_std=1e-3)"
        )
    if given:
        raise ConfigError(
            f"got {len(given)} labels, but {adapter.name} is a language model (task {adapter.task!r}), whose targets "
            "are the text itself; drop labels=, or give a classifier (task='sequence-classification')"
        )
    return None


def class_numbers(labels: Sequence[int | str] | None, adapter: TextAdapter, origin: str) -> list[int]:
    """Return class numbers for labels that may be class names of the model's configuration.

    Args:
        labels: Numbers or names.
        adapter: The classifier.
        origin: Where the labels come from, for messages.

    Returns:
        The numbers.

    Raises:
        DataError: If labels are missing or a name is unknown.
    """
    if labels is None:
        raise DataError(
            f"{origin} has no labels, and the gradient of a classifier needs them; pass label_column=, or labels= "
            "beside texts="
        )
    names = {str(k): v for k, v in (adapter.config.label2id or {}).items()}
    numbers = []
    for label in labels:
        if isinstance(label, str) and label not in names:
            raise DataError(f"{origin}: the model has no class {label!r}. {suggest(label, names)}")
        numbers.append(names[label] if isinstance(label, str) else label)
    return numbers
