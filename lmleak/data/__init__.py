"""Floor 1: private examples, from files, data sets, or embedded."""

from lmleak.data.images import NORMALIZATIONS, ImageData, load_images
from lmleak.data.load import Examples, load_examples

__all__ = ["NORMALIZATIONS", "Examples", "ImageData", "load_examples", "load_images"]
