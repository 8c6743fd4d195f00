"""Floor 2: the gradient that is shared."""

from lmleak.gradients.aggregate import update_of
from lmleak.gradients.capture import capture_gradient, gradient_of
from lmleak.gradients.per_example import per_example_gradients, shared_layers
from lmleak.gradients.shared import SharedGradient
from lmleak.gradients.store import GradientStore, GradientStoreWriter, store_gradients

__all__ = [
    "GradientStore", "GradientStoreWriter", "SharedGradient", "capture_gradient", "gradient_of",
    "per_example_gradients", "shared_layers", "store_gradients", "update_of",
]  # fmt: skip
