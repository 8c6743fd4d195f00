"""Floor 2: the gradient that is shared."""

from lmleak.gradients.capture import capture_gradient, gradient_of
from lmleak.gradients.shared import SharedGradient

__all__ = ["SharedGradient", "capture_gradient", "gradient_of"]
