"""Floor 1: the model-adapter layer shared by language and vision."""

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.adapters.load import adapt, load_adapter
from lmleak.adapters.structure import Selection
from lmleak.adapters.text import TextAdapter
from lmleak.adapters.vision import LeNet, VisionAdapter

__all__ = [
    "LeNet",
    "ModelAdapter",
    "Prior",
    "Selection",
    "TextAdapter",
    "VisionAdapter",
    "adapt",
    "load_adapter",
]
