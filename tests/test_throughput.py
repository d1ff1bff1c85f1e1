"""Throughput windows, MFU, peaks and timing."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from flowhn.benchmark import describe_device, median_time, peak_flops
from flowhn.benchmark.peaks import compute_dtype, datasheet_peak, measured_matmul
from flowhn.errors import UserError
from flowhn.training import ThroughputMonitor
from flowhn.training import throughput as throughput_module

TRAINER = SimpleNamespace(
    strategy=SimpleNamespace(root_device=torch.device("cpu")),
    world_size=1,
    precision="32-true",
    global_step=0,
    state=SimpleNamespace(fn="fit"),
)


class Clock:
    """A clock that the test moves, and a count of synchronisations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.synchronised = 100.0, 0
        monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(throughput_module, "device_synchronize", self._synchronise)

    def _synchronise(self, device: torch.device) -> None:
        self.synchronised += 1


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def monitor(**options) -> ThroughputMonitor:
    arguments = {"tokens_per_step": 1000, "flops_per_token": 6e6, "warmup_steps": 2, "window_steps": 4, "peak": 1e12}
    made = ThroughputMonitor(**{**arguments, **options})
    made.setup(TRAINER, None, "fit")
    made.on_train_start(TRAINER, None)
    return made


def steps(made: ThroughputMonitor, clock: Clock, seconds: list[float]) -> None:
    for duration in seconds:
        clock.now += duration
        made.on_step_end(TRAINER, None, 0)


def test_median_window_after_warm_up(clock):
    made = monitor()
    steps(made, clock, [60, 30] + [1] * 4 + [2] * 4 + [9] * 4 + [1])
    result = made.result()
    assert made.windows == [4, 8, 36]
    assert result["n_windows"] == 3
    assert result["step_seconds"] == 2
    assert result["tps"] == 500
    assert result["mfu"] == pytest.approx(500 * 6e6 / 1e12)
    assert (result["peak_flops"], result["peak_source"]) == (1e12, "configured")


def test_validation_and_checkpoints_are_left_out(clock):
    made = monitor()
    steps(made, clock, [5, 5, 1, 1])
    made.on_validation_start(TRAINER, None)
    clock.now += 1000
    made.on_validation_end(TRAINER, None)
    with made.paused():
        clock.now += 500
        with made.paused():
            clock.now += 7
    steps(made, clock, [1, 1])
    assert made.windows == [4]
    assert made.train_seconds == 14


def test_synchronised_at_window_ends_only(clock):
    made = monitor()
    steps(made, clock, [1] * 2)
    before = clock.synchronised
    steps(made, clock, [1] * 3)
    assert clock.synchronised == before
    steps(made, clock, [1])
    assert clock.synchronised > before


def test_windows_survive_a_resume(clock):
    made = monitor()
    steps(made, clock, [9, 9] + [1] * 6)
    again = monitor(window_steps=2)
    again.load_state_dict(made.state_dict())
    steps(again, clock, [9, 9] + [3] * 2)
    assert again.windows == [2, 6]  # the earlier window in the new window's length
    assert again.elapsed() == 48


def test_tokens_count_all_devices_and_mfu_one(clock):
    made = monitor()
    made._devices = 4
    steps(made, clock, [1] * 6)
    assert made.result()["tps"] == 1000
    assert made.result()["mfu"] == pytest.approx(1000 * 6e6 / 4 / 1e12)


def test_nothing_timed_or_unknown_peak_gives_none(clock):
    made = monitor(peak=None)
    made._device = torch.device("mps")
    assert made.result() == {
        "tps": None,
        "n_windows": 0,
        "step_seconds": None,
        "flops_per_token": 6e6,
        "mfu": None,
        "peak_flops": None,
        "peak_source": "unknown for mps",
    }


def test_peak_memory_is_that_of_the_run():
    made = monitor()
    block = torch.ones(40_000_000)  # 160 MB
    made.on_train_end(TRAINER, None)
    high = made.memory()
    assert high["kind"] == "rss"
    assert high["peak_bytes"] > block.nbytes
    del block
    again = monitor()
    again.on_train_end(TRAINER, None)
    if throughput_module.sys.platform == "linux":
        assert again.memory()["peak_bytes"] < high["peak_bytes"] - 100e6


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA RTX A6000", "bf16", 154.8),  # half of the sparse 309.7 that the published code divides by
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("NVIDIA L40S", "bf16", 362.1),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40", "bf16", 181.1),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bf16", 71.2),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", 80.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("NVIDIA B200", "bf16", 2250.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A1000 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Some New Accelerator", "bf16", None),
    ],
)
def test_datasheet_peaks(name, dtype, teraflops):
    assert datasheet_peak(name, dtype) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="dtype=int3"):
        datasheet_peak("NVIDIA H200", "int3")


def test_cuda_peak_comes_from_the_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(torch.device("cuda"), "bf16") == (989.4e12, "datasheet, dense bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X9")
    assert peak_flops(torch.device("cuda"), "bf16") == (None, "unknown for NVIDIA X9 in bf16")


def test_configured_peak_wins_and_must_be_positive():
    assert peak_flops(torch.device("cpu"), "fp32", configured=5e12) == (5e12, "configured")
    with pytest.raises(UserError, match="peak_flops=0"):
        peak_flops(torch.device("cpu"), "fp32", configured=0)


def test_cpu_peak_is_measured_once():
    measured_matmul.cache_clear()
    begun = time.perf_counter()
    peak, source = peak_flops(torch.device("cpu"), "fp32")
    assert source == "measured matmul"
    assert 1e8 < peak < 1e15
    assert time.perf_counter() - begun < 5
    assert peak_flops(torch.device("cpu"), "fp32")[0] == peak


def test_compute_dtype():
    assert compute_dtype("bf16-mixed", "cuda") == "bf16"
    assert compute_dtype("16-mixed", "cuda") == "fp16"
    assert compute_dtype("32-true", "cpu") == "fp32"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert compute_dtype("32-true", "cuda") == "tf32"
    torch.set_float32_matmul_precision(before)


def test_median_time_and_description():
    calls = []
    seconds = median_time(lambda: calls.append(time.sleep(0.002)), warmup=1, repeats=3, calls=2)
    assert len(calls) == 7
    assert 0.002 <= seconds < 0.1
    description = describe_device("cpu")
    assert set(description) == {"type", "name", "count", "cpu", "memory_bytes"}
    assert description["count"] == torch.get_num_threads()
    assert description["memory_bytes"] > 1e8
