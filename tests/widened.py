"""Code that casts to float32, run in float64."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Widened(TorchFunctionMode):
    """Every cast to float32 becomes one to float64: transformers, or lm-eval, without the casts that bound its precision."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})
