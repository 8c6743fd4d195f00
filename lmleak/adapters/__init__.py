"""Floor 1: the model-adapter layer shared by language and vision."""

from lmleak.adapters.base import ModelAdapter, Prior
from lmleak.adapters.image_models import ARCHITECTURES, LeNet, image_model
from lmleak.adapters.load import adapt, load_adapter
from lmleak.adapters.structure import Selection
from lmleak.adapters.text import TextAdapter
from lmleak.adapters.vision import VisionAdapter

__all__ = [
    "ARCHITECTURES",
    "LeNet",
    "ModelAdapter",
    "Prior",
    "Selection",
    "TextAdapter",
    "VisionAdapter",
    "adapt",
    "image_model",
    "load_adapter",
]
