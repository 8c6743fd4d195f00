"""Floor 2: the gradient that is shared."""

from lmleak.gradients.aggregate import update_of
from lmleak.gradients.capture import capture_gradient, gradient_of
from lmleak.gradients.shared import SharedGradient

__all__ = ["SharedGradient", "capture_gradient", "gradient_of", "update_of"]
