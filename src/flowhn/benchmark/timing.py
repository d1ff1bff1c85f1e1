"""Synchronised timing and a description of the machine."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch


def device_synchronize(device: torch.device) -> None:
    """Wait until the device has done all queued work; returns at once on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def median_time(
    fn: Callable[[], Any], *, device: torch.device | str = "cpu", warmup: int = 3, repeats: int = 10, calls: int = 1
) -> float:
    """Median seconds of one call of ``fn``.

    Args:
        fn: what to time; called without arguments.
        device: synchronised before and after each timed group.
        warmup: calls before timing starts (compilation, allocator, caches).
        repeats: timed groups, of which the median counts.
        calls: calls per group; more hide the cost of synchronising very short kernels.
    """
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        device_synchronize(device)
        begun = time.perf_counter()
        for _ in range(calls):
            fn()
        device_synchronize(device)
        seconds.append((time.perf_counter() - begun) / calls)
    return statistics.median(seconds)


def cpu_name() -> str:
    """The processor's marketing name, or the architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        told = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.strip():
            return told.stdout.strip()
    return platform.processor() or platform.machine()


def describe_device(device: torch.device | str, count: int = 1) -> dict[str, Any]:
    """``{type, name, count, cpu, memory_bytes}`` of the device; for the CPU, count is the number of threads torch uses.

    ``memory_bytes`` is the device's own memory (the machine's for CPU and MPS).
    """
    device = torch.device(device)
    cpu = cpu_name()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = cpu, psutil.virtual_memory().total
        count = torch.get_num_threads() if device.type == "cpu" else count
    return {"type": device.type, "name": name, "count": count, "cpu": cpu, "memory_bytes": memory}
