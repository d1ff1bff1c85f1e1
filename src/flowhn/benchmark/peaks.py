"""Peak matrix-multiplication speed of a device, the denominator of MFU.

All figures are *dense* (without structured sparsity) tensor-core peaks with float32 accumulation, in FLOP/s, from the
makers' datasheets and architecture white papers. Datasheets often print the sparse figure, twice as large. That is
why ``lightning.fabric.utilities.throughput.get_available_flops`` is not used: its H200 and H100 NVL rows (2.0e15,
1.98e15 for bf16) are sparse, its RTX A6000 and RTX 4090 rows are the plain fp32 rate, and it does not recognise
"NVIDIA H200".
A device that is not in the table has an unknown peak; MFU is then empty rather than guessed.
"""

from __future__ import annotations

import functools
import time

import torch

from flowhn.errors import UserError

# Words that must all occur in the device's name (first match wins, so longer names come first), then TFLOP/s for
# bf16, fp16, tf32 and fp32. None: the device has no such unit.
_PEAKS: tuple[tuple[tuple[str, ...], float | None, float | None, float | None, float | None], ...] = (
    # NVIDIA Blackwell: HGX B200 / B300 and GB200 NVL72 datasheets, per GPU, half of the printed sparse figures
    (("gb200",), 2500.0, 2500.0, 1250.0, 80.0),
    (("b200",), 2250.0, 2250.0, 1125.0, 75.0),
    (("b300",), 2250.0, 2250.0, 1125.0, 75.0),
    # NVIDIA Hopper: H200, H100 and H100 NVL datasheets; GH200 has an H100 SXM die
    (("h200", "nvl"), 835.5, 835.5, 417.5, 60.0),
    (("gh200",), 989.4, 989.4, 494.7, 66.9),
    (("h200",), 989.4, 989.4, 494.7, 66.9),
    (("h100", "nvl"), 835.5, 835.5, 417.5, 60.0),
    (("h100", "pcie"), 756.0, 756.0, 378.0, 51.2),
    (("h100",), 989.4, 989.4, 494.7, 66.9),
    (("h20",), 148.0, 148.0, 74.0, 44.0),
    # NVIDIA Ampere: A100, A30, A40, A10 datasheets, GA102 white paper (appendix A) for A6000, A5000 and GeForce
    (("a100",), 312.0, 312.0, 156.0, 19.5),
    (("a30",), 165.0, 165.0, 82.0, 10.3),
    (("a40",), 149.7, 149.7, 74.8, 37.4),
    (("rtx", "a6000"), 154.8, 154.8, 77.4, 38.7),
    (("rtx", "a5000"), 111.1, 111.1, 55.6, 27.8),
    (("rtx", "3090", "ti"), 80.0, 80.0, 40.0, 40.0),
    (("rtx", "3090"), 71.2, 71.2, 35.6, 35.6),
    (("rtx", "3080", "ti"), 68.2, 68.2, 34.1, 34.1),
    # NVIDIA Ada: L40S, L40 and L4 datasheets; AD102 white paper for RTX 6000 Ada and GeForce
    (("l40s",), 362.1, 362.1, 183.0, 91.6),
    (("l40",), 181.1, 181.1, 90.5, 90.5),
    (("l4",), 121.0, 121.0, 60.0, 30.3),
    (("rtx", "6000", "ada"), 364.2, 364.2, 182.1, 91.1),
    (("rtx", "4090"), 165.2, 165.2, 82.6, 82.6),
    (("rtx", "4080"), 97.5, 97.5, 48.7, 48.7),
    (("rtx", "5090"), 209.5, 209.5, 104.8, 104.8),
    # NVIDIA Volta and Turing (no bf16, no tf32): V100 and T4 datasheets
    (("v100", "pcie"), None, 112.0, None, 14.0),
    (("v100",), None, 125.0, None, 15.7),
    (("t4",), None, 65.0, None, 8.1),
    # AMD CDNA3: MI300X and MI325X data sheets
    (("mi300x",), 1307.4, 1307.4, 653.7, 163.4),
    (("mi325x",), 1307.4, 1307.4, 653.7, 163.4),
)
# Words that make another, usually slower, product of the same number ("RTX 4090 Laptop GPU", "RTX 4080 SUPER").
_VARIANTS = {"laptop", "max", "super", "ti", "d", "mobile", "ada"}
_COLUMNS = {"bf16": 0, "fp16": 1, "tf32": 2, "fp32": 3}
_MATMUL_SIZE = 1024
_MATMUL_SECONDS = 0.25


def compute_dtype(precision: str, device_type: str) -> str:
    """The table's column (bf16, fp16, tf32, fp32) for a Lightning precision string such as ``bf16-mixed``."""
    for name, column in (("bf16", "bf16"), ("16", "fp16")):
        if precision.startswith(name):
            return column
    tf32 = device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "fp32"


def datasheet_peak(name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of a device by its name as the driver gives it, or None where the table has none."""
    if dtype not in _COLUMNS:
        raise UserError(f"dtype={dtype} has no peak column; choose one of {', '.join(_COLUMNS)}")
    words = set(name.lower().replace("-", " ").replace("_", " ").split())
    for needed, *figures in _PEAKS:
        if words.issuperset(needed) and not (words & _VARIANTS).difference(needed):
            teraflops = figures[_COLUMNS[dtype]]
            return None if teraflops is None else teraflops * 1e12
    return None


@functools.cache
def measured_matmul(dtype: str = "fp32") -> float:
    """Best FLOP/s of a square matrix product on this CPU with the present number of threads; measured once per process.

    Random operands: some processors finish products of zeros or of constants faster.
    """
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, generator=generator).to(kind) for _ in range(2))
    torch.mm(a, b)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < _MATMUL_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * _MATMUL_SIZE**3 / best


def peak_flops(device: torch.device, dtype: str, configured: float | None = None) -> tuple[float | None, str]:
    """Peak FLOP/s of one device and where the figure comes from.

    Args:
        device: the device that computes.
        dtype: ``bf16``, ``fp16``, ``tf32`` or ``fp32``, see :func:`compute_dtype`.
        configured: a figure in FLOP/s from the user (``trainer.throughput.peak_flops``); wins over everything.

    Returns:
        ``(peak, source)``; the peak is None when it is unknown.

    Raises:
        UserError: the configured figure is not positive.
    """
    if configured is not None:
        if configured <= 0:
            raise UserError(f"trainer.throughput.peak_flops={configured} must be positive; use null for the table")
        return float(configured), "configured"
    if device.type == "cpu":
        return measured_matmul(dtype), "measured matmul"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = datasheet_peak(name, dtype)
        return peak, f"datasheet, dense {dtype}" if peak else f"unknown for {name} in {dtype}"
    return None, f"unknown for {device.type}"
