"""Keeping float64 models in float64.

Several transformers layers (RMSNorm, attention softmax, the loss) cast to float32 inside, which is an upcast for
half precision but a downcast for float64: oracles would stop at 1e-7 and a fully masked attention row becomes NaN.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class KeepDouble(TorchFunctionMode):
    """While active, a cast of a float64 tensor to float32 does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in (
                *args[1:],
                kwargs.get("dtype"),
            ):
                return args[0]
            if func in (F.softmax, torch.softmax, torch.Tensor.softmax) and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
