"""Measuring: synchronised timing, device descriptions and datasheet peaks."""

from flowhn.benchmark.peaks import peak_flops
from flowhn.benchmark.timing import describe_device, device_synchronize, median_time

__all__ = ["describe_device", "device_synchronize", "median_time", "peak_flops"]
