"""One cell of a benchmark, in a process of its own: build a model, train it on random tokens, time it.

:func:`measure` runs in a process that :mod:`flowhn.bench_process` starts.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowhn.benchmark import describe_device, device_synchronize, peak_flops
from flowhn.benchmark.peaks import compute_dtype, measured_matmul
from flowhn.benchmark.peers import build_peer, peer_kernels
from flowhn.config import build_model, compose, to_dict
from flowhn.errors import UserError
from flowhn.models.kernels import kernels_used
from flowhn.training.hardware import resolve_hardware
from flowhn.training.lit_lm import LitLM
from flowhn.training.loss import training_loss
from flowhn.training.optim import build_optimizer

_MIN_GAIN = 1.02  # a doubled batch must be that much faster for the search to go on
_MATMUL = 8192
_SUSTAINED_SECONDS = 0.5  # a product that runs on is slower than a burst on an H200, as training's are
_SEARCH_STEPS = 4


@dataclass(frozen=True)
class Step:
    """What a timed step needs; ``loss(input_ids, labels)`` is scalar."""

    loss: Callable[[Tensor, Tensor], Tensor]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: torch.dtype | None
    device: torch.device

    def __call__(self, input_ids: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self.loss(input_ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.0) -> float:
    """FLOP/s of a large square product of random matrices on this device now, the median of windows of five (CPU: the best).

    Args:
        seconds: how long products run before those that count, and again while they count; 0: two windows before, five that
            count (50 ms on an H200: a burst). Of no meaning on a CPU.
    """
    if device.type == "cpu":
        return measured_matmul("bf16" if dtype == torch.bfloat16 else "fp32")
    a, b = (torch.randn(_MATMUL, _MATMUL, device=device, dtype=dtype) for _ in range(2))

    def window() -> float:
        device_synchronize(device)
        begun = time.perf_counter()
        for _ in range(5):
            torch.mm(a, b)
        device_synchronize(device)
        return (time.perf_counter() - begun) / 5

    def windows(least: int) -> list[float]:
        found, begun = [], time.perf_counter()
        while len(found) < least or time.perf_counter() - begun < seconds:
            found.append(window())
        return found

    windows(2)
    return 2 * _MATMUL**3 / statistics.median(windows(5))


def _build(spec: Mapping[str, Any], config: Mapping[str, Any], device: torch.device, compiles: bool) -> Step:
    torch.manual_seed(spec["seed"])
    autocast = torch.bfloat16 if spec["precision"] == "bf16-mixed" else None
    with device:  # a billion weights drawn on the CPU take longer than the measurement
        module = build_peer(spec["peer"], config) if spec["peer"] else build_model(config)
    module = module.to(device).train()
    if spec["peer"]:
        run = torch.compile(module, dynamic=False) if compiles else module
        return Step(run, module, build_optimizer(module, config["optimizer"]), autocast, device)
    net = module
    lit = LitLM(net=net, optimizer=config["optimizer"], schedule={}, compile=compiles)
    lit.configure_model()  # compiles as training does

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        head = net.lm_head
        return training_loss(net.body(input_ids), head.weight, getattr(head, "bias", None), labels, plain=lit._loss)

    return Step(loss, net, build_optimizer(net, config["optimizer"]), autocast, device)


def _check_peer(name: str, device: torch.device) -> None:
    """Raises UserError on a GPU without the kernels that transformers' models are written for: no fair comparison."""
    ssm = peer_kernels(name)["ssm"]
    if device.type == "cuda" and ssm is not None and not ssm.startswith("mamba_ssm"):
        raise UserError(
            f"peer_{name} would run transformers' loop over tokens ({ssm}): pip install mamba-ssm causal-conv1d, or leave it out "
            "of models="
        )


def _tokens(spec: Mapping[str, Any], batch: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uniformly random ids and the next of each, (B, T)."""
    generator = torch.Generator().manual_seed(spec["seed"] + 1)
    ids = torch.randint(vocab_size, (batch, spec["seq_len"] + 1), generator=generator)
    return ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)


def _time(
    step: Step, data: tuple[Tensor, Tensor], *, warmup: int, windows: int, steps: int
) -> tuple[float, list[float]]:
    """Seconds of the first step (compilation in it), and of a step in each window."""
    begun = time.perf_counter()
    step(*data)
    device_synchronize(step.device)
    first = time.perf_counter() - begun
    for _ in range(warmup):
        step(*data)
    seconds = []
    for _ in range(windows):
        device_synchronize(step.device)
        begun = time.perf_counter()
        for _ in range(steps):
            step(*data)
        device_synchronize(step.device)
        seconds.append((time.perf_counter() - begun) / steps)
    return first, seconds


def _search(
    spec: Mapping[str, Any], run: Callable[[int, int, int], dict[str, Any]]
) -> tuple[int, list[dict[str, Any]]]:
    """Double the batch until the device is full or nothing is gained; returns the fastest and all that was tried."""
    tried, best, batch = [], (0.0, 0), spec["first_batch"]
    while True:
        try:
            seconds = statistics.median(run(batch, 2, _SEARCH_STEPS)["seconds"])
        except torch.OutOfMemoryError:
            tried.append({"batch": batch, "status": "out of memory"})
            break
        rate = batch * spec["seq_len"] / seconds
        tried.append({"batch": batch, "status": "done", "tps": rate})
        gained = rate > _MIN_GAIN * best[0]
        if rate > best[0]:
            best = (rate, batch)
        if not gained:
            break
        batch *= 2
    if not best[1]:
        raise torch.OutOfMemoryError(f"not even batch={spec['first_batch']} fits")
    return best[1], tried


def _first(spec: Mapping[str, Any]) -> int:
    return spec["batch"] if isinstance(spec["batch"], int) else spec["first_batch"]


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The measured part of a cell's record; ``status`` is ``done`` or ``out of memory``."""
    config = to_dict(compose("train", spec["overrides"]))
    hardware = resolve_hardware({**config, "precision": spec["precision"], "compile": spec["compile"]})
    device = hardware.device
    if spec["peer"]:
        _check_peer(spec["peer"], device)
    torch.set_float32_matmul_precision("highest" if spec["protocol"] == "published" else "high")
    torch.backends.cudnn.allow_tf32 = spec["protocol"] != "published"
    if config["choices"]["model"] == "flowhn" and config["split"].get("balance") == "time":
        config["measured_balance"] = _balance(spec, config, hardware)
    spec = {**spec, "precision": hardware.precision}

    how: dict[str, Any] = {"precision": hardware.precision, "compile": hardware.compile}

    def run(batch: int, windows: int, steps: int) -> dict[str, Any]:
        try:
            return attempt(batch, windows, steps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what torch.compile makes of foreign code; the peer then runs as it is
            if not (spec["peer"] and how["compile"]):
                raise
            how.update(compile=False, compile_error=(str(error).strip().splitlines() or [type(error).__name__])[0])
        return attempt(batch, windows, steps)

    def attempt(batch: int, windows: int, steps: int) -> dict[str, Any]:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = _build(spec, config, device, how["compile"])
        data = _tokens(spec, batch, config["vocab_size"], device)
        first, seconds = _time(step, data, warmup=spec["warmup_steps"], windows=windows, steps=steps)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        found = {"first": first, "seconds": seconds, "peak_bytes": peak, "step": step, "data": data}
        found["parameters"] = sum(parameter.numel() for parameter in step.module.parameters())
        found["kernels"] = peer_kernels(spec["peer"]) if spec["peer"] else kernels_used(step.module, device.type)
        return found

    if not spec["windows"]:  # only fill the compilation caches
        return {"status": "prepared", "first_step_seconds": run(_first(spec), 0, 0)["first"]}
    base = {"device": describe_device(device), "config": config}
    try:
        batch, tried = (spec["batch"], []) if isinstance(spec["batch"], int) else _search(spec, run)
        found = run(batch, spec["windows"], spec["steps_per_window"])
    except torch.OutOfMemoryError as error:
        return {**base, **how, "status": "out of memory", "reason": str(error).splitlines()[0], "batch": spec["batch"]}
    figures = _figures(spec, config, found, batch, device)
    result = {**base, **how, "status": "done", "tried": tried, "batch": batch, **figures}
    if spec["profile"]:
        from flowhn.benchmark.profile import profile_steps

        result["profile"] = profile_steps(lambda: found["step"](*found["data"]), device=device)
    return result


def _figures(
    spec: Mapping[str, Any], config: Mapping[str, Any], found: Mapping[str, Any], batch: int, device: torch.device
) -> dict[str, Any]:
    """Tokens/s, MFU and the like from the timed windows."""
    tokens = batch * spec["seq_len"]
    seconds = statistics.median(found["seconds"])
    with torch.device("meta"):
        flops_per_token = 3 * build_model(config).flops(spec["seq_len"]) / spec["seq_len"]
    peak, source = peak_flops(device, compute_dtype(spec["precision"], device.type))
    dtype = torch.bfloat16 if spec["precision"] == "bf16-mixed" else torch.float32
    rate, on_cpu = matmul_rate(device, dtype), device.type == "cpu"
    achieved = flops_per_token * tokens / seconds
    return {
        "parameters": found["parameters"],
        "kernels": found["kernels"],
        "tps": tokens / seconds,
        "step_seconds": seconds,
        "window_step_seconds": found["seconds"],
        "first_step_seconds": found["first"],
        "peak_bytes": found["peak_bytes"],
        "flops_per_token": flops_per_token,
        "peak_flops": peak,
        "peak_source": source,
        "mfu": achieved / peak if peak else None,
        "matmul_flops": rate,
        "matmul_flops_sustained": None if on_cpu else matmul_rate(device, dtype, seconds=_SUSTAINED_SECONDS),
        "share_of_matmul": achieved / rate,
    }


def _balance(spec: Mapping[str, Any], config: dict[str, Any], hardware: Any) -> dict[str, Any]:
    """Measure the cut of ``split.balance=time`` and put it into ``config``."""
    from dataclasses import asdict

    from flowhn.benchmark.balance import measure_balance, set_ratio

    found = measure_balance(
        build_model(config).layers[0].to(hardware.device),
        seq_len=spec["seq_len"],
        batch_size=_first(spec),
        d_model=config["size"]["d_model"],
        device=hardware.device,
        dtype=torch.bfloat16 if hardware.precision == "bf16-mixed" else None,
        compile=hardware.compile,
    )
    set_ratio(config["model"], found.ratio)
    return asdict(found)
