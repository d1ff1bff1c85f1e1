"""``flowhn-bench``: time training steps of many models, sizes, batches and lengths, one process for each cell.

Each cell leaves one record; a cell whose record exists is not measured again, so a benchmark that is stopped, or that has
``max_minutes``, goes on with the same command. Tables and figures are drawn from the records.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowhn.bench_process import run_cell
from flowhn.cli import run_entry
from flowhn.config import compose, config_dir, nearest, to_dict
from flowhn.errors import UserError
from flowhn.reporting.bench import find_bench_records, read_bench_record, write_bench, write_bench_record
from flowhn.reporting.record import config_hash, environment

PROTOCOLS = {
    "optimised": {"precision": "auto", "compile": "auto"},  # bf16 and compiled on CUDA
    "published": {"precision": "32-true", "compile": False},
}
_FIRST_BATCH = {"tiny": 2, "135m": 16, "350m": 8, "1b": 4}  # where batch=auto begins at 1,024 tokens
_FAILED = ("failed", "timed out")
COMMAND = "command.txt"


def main() -> None:
    """Entry point of ``flowhn-bench``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    if not {"-h", "--help"}.isdisjoint(argv):
        sys.stdout.write((config_dir() / "bench.yaml").read_text(encoding="utf-8"))  # every option with its comment
        return 0
    config = to_dict(compose("bench", argv))
    case = config["bench"]
    folder = Path(config["output_dir"]) / "bench" / case["name"]
    specs = list(plan(config))
    if config["prepare"]:
        _prepare(specs, folder, config)
    cold = _cold_seconds(folder)
    begun, left = time.monotonic(), []
    for number, spec in enumerate(specs, start=1):
        path = folder / "records" / f"{spec_name(spec)}.json"
        if path.is_file() and read_bench_record(path)["status"] not in _FAILED:
            continue
        if config["max_minutes"] is not None and time.monotonic() - begun > 60 * config["max_minutes"]:
            left.append(spec_name(spec))
            continue
        sys.stderr.write(f"[{number}/{len(specs)}] {spec_name(spec)}\n")
        record = {**_run(spec, config["cell_timeout_s"]), "case": case["name"]}
        if spec_name(spec) in cold:  # the timed process found its kernels in the caches
            record["cold_first_step_seconds"] = cold[spec_name(spec)]
        if config["commit"] is not None:
            record["git"] = {"commit": str(config["commit"]), "dirty": None}
        write_bench_record(path, record)
        sys.stderr.write(f"    {_line(record)}\n")
    records = find_bench_records(folder / "records")
    if records:
        written = write_bench(records, folder, title=case["title"])
        (folder / COMMAND).write_text(f"{_command(argv)}\n", encoding="utf-8")
        sys.stdout.write(written[0].read_text(encoding="utf-8") + "\nwritten:\n" + "".join(f"  {p}\n" for p in written))
    if left:
        sys.stdout.write(f"not measured yet (max_minutes): {', '.join(left)}; the same command goes on\n")
    failed = [record for record in records if record["status"] in _FAILED]
    for record in failed:
        sys.stderr.write(f"error: {record['cell']} at {record['size']} {record['status']}: {record['reason']}\n")
    return 2 if failed else 0


def _command(argv: Sequence[str]) -> str:
    """The command that makes this again, without what is only about this machine's folders."""
    return shlex.join(
        ["flowhn-bench", *(word for word in argv if not word.startswith(("output_dir=", "max_minutes=")))]
    )


def _cold_seconds(folder: Path) -> dict[str, float]:
    """Seconds of the first step of each cell that was prepared, compilation (beside other cells') in it."""
    path = folder / "prepared.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _prepare(specs: Sequence[Mapping[str, Any]], folder: Path, config: Mapping[str, Any]) -> None:
    """Compile the missing cells, several at a time, so that the timed pass finds its kernels in the caches."""
    cold = _cold_seconds(folder)
    missing = [spec for spec in specs if not (folder / "records" / f"{spec_name(spec)}.json").is_file()]
    with ThreadPoolExecutor(config["prepare"]) as pool:
        jobs = [{**spec, "windows": 0, "warmup_steps": 0, "profile": False} for spec in missing]
        for spec, result in zip(missing, pool.map(lambda job: _run(job, config["cell_timeout_s"]), jobs), strict=True):
            seconds = result.get("first_step_seconds")
            if seconds is not None:
                cold[spec_name(spec)] = seconds
            how = f"first step {seconds:.0f} s" if seconds is not None else f"{result['status']}: {result['reason']}"
            sys.stderr.write(f"prepared {spec_name(spec)}: {how}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prepared.json").write_text(json.dumps(cold), encoding="utf-8")


def plan(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells of a resolved ``configs/bench.yaml``, size by size.

    Raises:
        UserError: a model, size or protocol that is not there, or a batch that is not a number.
    """
    case = config["bench"]
    chosen = _chosen("models", config["models"], case["cells"])
    sizes = _chosen("sizes", config["sizes"] or case["sizes"], _FIRST_BATCH)
    protocol = config["protocol"] or case["protocol"]
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol={protocol} does not exist; {nearest(protocol, PROTOCOLS)}")
    lengths = [config["seq_len"]] if config["seq_len"] else case["seq_lens"]
    for size in sizes:
        for seq_len in lengths:
            for cell in chosen:
                batch, first = _batch(config, case, size, cell, seq_len, lengths[0])
                entry = case["cells"][cell]
                peer, own = (entry["peer"], entry["overrides"]) if isinstance(entry, Mapping) else (None, entry)
                overrides = [
                    *own,
                    f"size={size}",
                    f"seq_len={seq_len}",
                    f"global_batch_tokens={seq_len}",
                    *config["overrides"],
                ]
                compose("train", overrides)  # a bad override is one sentence before anything is measured
                yield {
                    "cell": cell, "size": size, "seq_len": seq_len, "protocol": protocol, "peer": peer, "batch": batch,
                    "first_batch": first, "overrides": overrides, "repeat": config["repeat"], "seed": config["seed"],
                    "windows": config["windows"], "steps_per_window": config["steps_per_window"],
                    "warmup_steps": config["warmup_steps"], "profile": config["profile"], **PROTOCOLS[protocol],
                }  # fmt: skip


def _chosen(key: str, wanted: Any, known: Mapping[str, Any]) -> list[str]:
    names = (
        list(known) if wanted is None else [str(name) for name in (wanted if isinstance(wanted, list) else [wanted])]
    )
    for name in names:
        if name not in known:
            raise UserError(f"{key}={name} is not in this benchmark; {nearest(name, known)}")
    return names


def _batch(
    config: Mapping[str, Any], case: Mapping[str, Any], size: str, cell: str, seq_len: int, shortest: int
) -> tuple[Any, int]:
    """The number of sequences or ``auto``, and where a search begins.

    The bench file's ``batch`` may differ by size, and within a size by cell (``{default: 64, mamba1: 16}``).
    """
    batch = config["batch"] if config["batch"] is not None else case["batch"]
    batch = batch.get(size) if isinstance(batch, Mapping) else batch
    batch = batch.get(cell, batch.get("default")) if isinstance(batch, Mapping) else batch
    first = max(1, _FIRST_BATCH[size] * 1024 // seq_len) if seq_len > 1024 else _FIRST_BATCH[size]
    if batch == "auto":
        return batch, first
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise UserError(f"batch={batch} must be auto or a number of sequences, at least 1")
    if case.get("constant_tokens"):
        batch = max(1, batch * shortest // seq_len)
    return batch, first


def spec_name(spec: Mapping[str, Any]) -> str:
    """File name of a cell's record: readable, and different for everything that changes the measurement."""
    asked = {key: value for key, value in spec.items() if key != "profile"}
    return f"{spec['cell']}-{spec['size']}-T{spec['seq_len']}-{spec['protocol']}-r{spec['repeat']}-{config_hash(asked)[:8]}"


def _run(spec: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """A cell's record: what was asked, what was found or why not, and where and when."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    base = {**spec, **environment(), "created": created, "device": {"name": None, "type": None}, "tried": []}
    return {**base, **run_cell(spec, timeout)}


def _line(record: Mapping[str, Any]) -> str:
    if record["status"] != "done":
        return f"{record['status']}: {record['reason']}"
    share = 100 * record["share_of_matmul"]
    return (
        f"{record['tps']:,.0f} tokens/s at batch {record['batch']}, {share:.1f} % of the matrix-product rate, "
        f"first step {record['first_step_seconds']:.0f} s, cell {record['cell_seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
