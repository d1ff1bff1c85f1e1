"""``split.balance=time`` in a run: measure once, keep the cut in the run's folder and in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.config import build_model
from flowhn.reporting.record import config_hash
from flowhn.run_folder import describe_run

if TYPE_CHECKING:
    from flowhn.runs import Run


def balance_by_time(run: Run, hardware: Any, say: Callable[[str], None]) -> None:
    """Measure the cut of ``split.balance=time`` and put it into the run's config as its ratio.

    Kept in the run's folder, where a resumed run finds it, and in the cache, where runs of the same shape do.
    """
    config = run.config
    split = config["split"]
    if config["choices"]["model"] != "flowhn" or split.get("balance") != "time" or split.get("ratio") is not None:
        return
    import torch

    from flowhn.benchmark.balance import load_or_measure, measure_balance, set_ratio
    from flowhn.benchmark.timing import describe_device
    from flowhn.training import batch_plan

    rows, _ = batch_plan(
        global_batch_tokens=config["global_batch_tokens"],
        seq_len=config["seq_len"],
        micro_batch_size=config["micro_batch_size"],
        n_devices=hardware.n_devices,
    )
    bf16 = hardware.precision.startswith("bf16")

    def measure() -> Any:
        say(f"{run.name}: measuring both branches' time on this device")
        block = build_model(config).layers[0].to(hardware.device)
        return measure_balance(
            block,
            seq_len=config["seq_len"],
            batch_size=rows,
            d_model=config["size"]["d_model"],
            device=hardware.device,
            dtype=torch.bfloat16 if bf16 else None,
            compile=hardware.compile,
        )

    shape = {"model": config["model"], "rows": rows, "seq_len": config["seq_len"], "precision": hardware.precision}
    key = config_hash(
        shape | {"compile": hardware.compile, "device": describe_device(hardware.device), "torch": torch.__version__}
    )
    cached = Path(config["cache_dir"]) / "balance" / f"{key}.json"
    found = load_or_measure(run.folder / "balance.json", lambda: load_or_measure(cached, measure))
    set_ratio(config["model"], found.ratio)
    config["measured_balance"] = asdict(found)
    split["ratio"] = found.ratio
    describe_run(run)
