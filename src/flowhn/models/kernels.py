"""Which kernels run: what is installed, what works on a device, and what a model will use.

Packages are probed at first use, never at import, and a probe never raises: a package that is missing, was built for
another torch, or fails at import for any reason counts as unusable, and the reason is kept for the reader.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from flowhn.errors import UserError

INSTALL_HINT = "pip install 'flowhn[gpu]'"
_SSM_CHOICES = ("auto", "torch", "mamba_ssm", "triton")
_ATTENTION_CHOICES = ("auto", "sdpa", "flash_attn")


def _probe_mamba_ssm() -> None:
    scan = importlib.import_module("selective_scan_cuda")
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    needed = [(scan, "fwd"), (scan, "bwd")]
    needed += [(combined, f"_mamba_chunk_scan_combined_{half}") for half in ("fwd", "bwd")]
    for owner, name in needed:
        if not callable(getattr(owner, name, None)):
            raise ImportError(f"{owner.__name__} has no {name}")
    if torch.cuda.is_available():
        # A wheel built for another GPU imports well and fails at its first launch ("no kernel image").
        u = torch.zeros(1, 4, 8, device="cuda")
        state = torch.zeros(1, 1, 8, 8, device="cuda")
        scan.fwd(u, u, -torch.ones(4, 8, device="cuda"), state, state, None, None, None, False)
        torch.cuda.synchronize()


def _probe_flash_attn() -> None:
    module = importlib.import_module("flash_attn")
    if not callable(getattr(module, "flash_attn_func", None)):
        raise ImportError("flash_attn has no flash_attn_func")


_PROBES: dict[str, Callable[[], None]] = {"mamba_ssm": _probe_mamba_ssm, "flash_attn": _probe_flash_attn}


@cache
def _probe(name: str) -> tuple[bool, str]:
    try:
        _PROBES[name]()
    except ModuleNotFoundError as error:
        return False, f"not installed ({error})"
    except Exception as error:  # a broken binary package may raise anything at import; none of it may stop a CPU user
        lines = str(error).strip().splitlines()
        return False, f"broken ({type(error).__name__}: {lines[0] if lines else 'no message'})"
    return True, "usable"


def kernel_status() -> dict[str, tuple[bool, str]]:
    """Each optional kernel package with (usable here, reason). Usable ones still need CUDA tensors to run."""
    return {name: _probe(name) for name in _PROBES}


def _require(key: str, name: str, device_type: str) -> None:
    usable, reason = _probe(name)
    if not usable:
        raise UserError(f"{key}={name} is {reason}; install it with {INSTALL_HINT} or use {key}=auto")
    if device_type != "cuda":
        raise UserError(
            f"{key}={name} runs on CUDA alone and the device is {device_type}; use {key}=auto, or on a CUDA machine "
            f"install it with {INSTALL_HINT}"
        )


@cache
def _resolve_ssm(requested: str, device_type: str, has_triton: bool) -> str:
    if requested not in _SSM_CHOICES:
        raise UserError(f"kernels={requested} is unknown; choose one of {', '.join(_SSM_CHOICES)}")
    if requested == "mamba_ssm":
        _require("kernels", "mamba_ssm", device_type)
        return "mamba_ssm"
    if requested == "triton" and (device_type != "cuda" or not _triton_usable()):
        raise UserError(
            f"kernels=triton needs an Ampere or newer GPU with Triton and the device is {device_type}; use kernels=auto, "
            "or install a CUDA build of torch (Triton comes with it)"
        )
    if device_type != "cuda" or requested == "torch":
        return "torch"
    if has_triton and _triton_usable():
        return "triton"
    return "mamba_ssm" if _probe("mamba_ssm")[0] else "torch"


@cache
def _resolve_attention(requested: str, device_type: str) -> str:
    if requested not in _ATTENTION_CHOICES:
        raise UserError(f"attention={requested} is unknown; choose one of {', '.join(_ATTENTION_CHOICES)}")
    if requested == "flash_attn":
        _require("attention", "flash_attn", device_type)
        return "flash_attn"
    return "sdpa"


@torch.compiler.assume_constant_result
def resolve_ssm(requested: str, device_type: str, has_triton: bool = False) -> str:
    """``torch``, ``mamba_ssm`` or ``triton`` for a device type ("cuda", "cpu", "mps", "meta"); cached.

    ``auto`` on CUDA takes the first that works of our Triton kernels (faster than mamba_ssm's on an H200), mamba_ssm and
    plain torch.

    Args:
        has_triton: the mixer has a Triton kernel for its sizes. Without one ``triton`` means the same as ``auto``.

    Raises:
        UserError: an unknown name, or ``mamba_ssm`` or ``triton`` asked for by name where it cannot be used.
    """
    return _resolve_ssm(requested, device_type, has_triton)


@torch.compiler.assume_constant_result
def resolve_attention(requested: str, device_type: str) -> str:
    """``sdpa`` or ``flash_attn`` for a device type; cached.

    ``auto`` is SDPA also where flash_attn works: on CUDA it already picks a flash kernel (cuDNN's on Hopper), and
    flash_attn could be run on none of the machines this was developed on.

    Raises:
        UserError: an unknown name, or ``flash_attn`` asked for by name where it cannot be used.
    """
    return _resolve_attention(requested, device_type)


@cache
def takes_register_caps(device: torch.device) -> bool:
    """Whether a Triton kernel here may be given a cap of registers: before Hopper many of ours would spill, and AMD's compiler
    knows no cap."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


# For custom operators whose kernels take rows that lie apart. torch.compile pads rows of which the bytes are no multiple of
# 128 (in_proj of Mamba-2 at 135m makes 3,352 columns) and, without the tag, copies what an operator reads of them.
ANY_STRIDES = (torch.Tag.needs_fixed_stride_order,)


@cache
def _triton_usable() -> bool:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        importlib.import_module("triton")
    except Exception:  # as with the packages above: a broken one counts as absent
        return False
    return True


@torch.compiler.assume_constant_result
def triton_usable() -> bool:
    """Whether Triton kernels run on the CUDA device: Triton is importable and the device is Ampere or newer; cached."""
    return _triton_usable()


@cache
def _flash_sdpa_usable() -> bool:
    # Not on ROCm, whose kernels may align a causal mask with the first key.
    built = (
        torch.version.hip is None and torch.cuda.is_available() and torch.backends.cuda.is_flash_attention_available()
    )
    return built and torch.cuda.get_device_capability() >= (8, 0)


@torch.compiler.assume_constant_result
def flash_sdpa_usable() -> bool:
    """Whether torch was built with flash attention for NVIDIA's GPUs and the device is Ampere or newer; cached."""
    return _flash_sdpa_usable()


def clear_cache() -> None:
    """Forget what was probed, for tests and for a package installed while the process runs."""
    for function in (_probe, _resolve_ssm, _resolve_attention, _triton_usable, _flash_sdpa_usable):
        function.cache_clear()


def kernels_used(model: nn.Module, device_type: str) -> dict[str, str | None]:
    """What the mixers of ``model`` run on a device: ``{"ssm": ..., "attention": ...}``, null where it has none.

    Several names are joined with "+" (attention layers that keep meta tokens in sight of a window run SDPA also under
    ``flash_attn``).

    Raises:
        UserError: a kernel asked for by name that cannot be used on that device.
    """
    found: dict[str, set[str]] = {"ssm": set(), "attention": set()}
    for module in model.modules():
        kernel = getattr(module, "kernel", None)
        if callable(kernel):
            found[module.kernel_kind].add(kernel(device_type))
    return {kind: "+".join(sorted(names)) or None for kind, names in found.items()}
