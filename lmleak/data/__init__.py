"""Floor 1: private examples, from files, data sets, or embedded."""

from lmleak.data.load import Examples, load_examples

__all__ = ["Examples", "load_examples"]
