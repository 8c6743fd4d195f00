"""The kinds of refusal: every error that lmleak raises on purpose is one of these."""


class LmleakError(Exception):
    """Base of every deliberate refusal; the command line prints it without a traceback."""


class ConfigError(LmleakError, ValueError):
    """A setting, name or argument that cannot be right; the message names the nearest valid one."""


class DataError(LmleakError, ValueError):
    """Private data, a gradient or a file that cannot be used as given (empty, truncated, NaN, wrong shape)."""


class UnsupportedModelError(LmleakError, TypeError):
    """A model whose derivatives would be missing or silently wrong."""


class UnsupportedCombinationError(LmleakError, ValueError):
    """Two valid choices that exclude each other, with the mathematical or threat-model reason."""


class ConvergenceError(LmleakError, ArithmeticError):
    """A solver stopped short and the caller asked for a converged number.

    Args:
        message: What was solved and what to change.
        residual: Relative residual reached.
    """

    def __init__(self, message: str, residual: float):
        super().__init__(f"{message} (relative residual reached: {residual:.3e})")
        self.residual = residual
