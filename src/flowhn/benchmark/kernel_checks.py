"""Is a kernel right, and how fast: a small forward and backward pass against the plain-torch path."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowhn.benchmark.timing import median_time
from flowhn.models.mixers import Attention, Mamba1, Mamba2

_WIDTH, _BATCH, _TOKENS = 64, 2, 65  # an odd length: kernels with blocks go wrong at their edges first
_TIMED_TOKENS = 512
# Kernels compute in bfloat16, whose numbers are 2^-8 apart: a handful of such errors, relative to the largest number.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}
_MIXERS = {
    "attention": lambda backend: Attention(d_model=_WIDTH, n_heads=4, n_kv_heads=2, backend=backend),
    "mamba1": lambda backend: Mamba1(d_model=_WIDTH, bcdt_rms_norm=True, backend=backend),
    "mamba2": lambda backend: Mamba2(d_model=_WIDTH, d_state=32, headdim=32, chunk_size=64, backend=backend),
}
MIXERS = tuple(_MIXERS)


@dataclass(frozen=True)
class KernelCheck:
    """Largest relative difference to the plain path (root mean squares) over output and gradients, and tokens/s of a layer.

    ``error`` says why it did not run at all; the other fields are None then.
    """

    mixer: str
    backend: str
    difference: float | None = None
    tolerance: float | None = None
    tokens_per_second: float | None = None
    error: str | None = None

    @property
    def correct(self) -> bool:
        """It ran, and agrees."""
        return self.difference is not None and self.difference <= self.tolerance


def check_kernel(mixer: str, backend: str, device: torch.device | str) -> KernelCheck:
    """Run ``mixer`` (``attention``, ``mamba1`` or ``mamba2``) on ``backend`` and compare it with fp32 on the plain path.

    On CUDA in bfloat16, as training does; elsewhere in fp32, where the reference is float64. A kernel may fail in any
    way; that is a result here, not an exception.
    """
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reference = _MIXERS[mixer]("sdpa" if mixer == "attention" else "torch")
            x = torch.randn(_BATCH, _TOKENS, _WIDTH)
            dy = torch.randn(_BATCH, _TOKENS, _WIDTH)
        tested = _MIXERS[mixer](backend)
        tested.load_state_dict(reference.state_dict())
        tested.to(device)
        wanted = _run(reference.double(), x.double(), dy.double())
        found = _run(tested, x.to(device), dy.to(device), dtype)
        difference = max(_relative(a, b) for a, b in zip(found, wanted, strict=True))
        return KernelCheck(mixer, backend, difference, TOLERANCE[dtype], _speed(tested, device, dtype))
    except Exception as error:  # a binary package built for another GPU or torch may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return KernelCheck(mixer, backend, error=first)


def _run(module: nn.Module, x: Tensor, dy: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and the gradients of input and parameters."""
    x = x.requires_grad_()
    module.zero_grad(set_to_none=True)
    with _autocast(x.device, dtype):
        y = module(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def _autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the reference; NaN counts as infinite."""
    difference = (found.detach().cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return float(difference) if torch.isfinite(difference) else float("inf")


def _speed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    x = torch.randn(8, _TIMED_TOKENS, _WIDTH, device=device)
    dy = torch.randn_like(x)
    seconds = median_time(lambda: _run(module, x.detach(), dy, dtype), device=device, warmup=2, repeats=3)
    return 8 * _TIMED_TOKENS / seconds
