"""Long runs, measured: a large corpus prepared in bounded memory and taken up after kills; memory and logs of 10,000
training steps; memory of repeated evaluation.

    nice -n 19 python scripts/long_run.py --out docs/reliability/long_run.json      2 GB and 10,000 steps, about 20 minutes
    python scripts/long_run.py --out FILE.json --corpus-bytes 4e6 --steps 300       a minute

Memory is that of a process with its children, mapped files included. Slopes are least squares over the samples after the
first fifth, with their standard error. The exit code is 1 where a figure is over its limit (scripts/long_run_limits.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from long_run_data import Watch, data_preparation, disk_bytes
from long_run_limits import failures

WARM = 0.2  # share of the samples before memory is called settled
SIZES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
EVALUATION_ROUNDS = 1000
REQUESTS = 16
PARTS = ("data_preparation", "training", "evaluation")


def slope(samples: list[tuple[float, int]], per: float) -> dict[str, float]:
    """Change of memory over a long run.

    Args:
        samples: (position in the run from 0 to 1, bytes).
        per: length of the whole run in the unit of the slope (10 for 10,000 steps and a slope per 1,000).
    """
    settled = [sample for sample in samples if sample[0] >= WARM]
    if len(settled) < 3:
        raise RuntimeError(f"{len(samples)} samples are too few for a slope; make the run longer")
    x, y = (np.array(column, dtype=np.float64) for column in zip(*settled, strict=True))
    design = np.stack([x - x.mean(), np.ones_like(x)], axis=1)
    (gain, middle), *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ np.array([gain, middle])
    error = np.sqrt(residual.var() * len(y) / max(1, len(y) - 2) / ((x - x.mean()) ** 2).sum())
    return {
        "samples": len(settled),
        "first_bytes": int(settled[0][1]),
        "last_bytes": int(settled[-1][1]),
        "highest_bytes": int(y.max()),
        "slope_bytes": float(gain / per),
        "slope_standard_error_bytes": float(error / per),
    }


def _command(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def training(folder: Path, *, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a very tiny model for ``steps`` steps by ``flowhn-reproduce``; returns what became of memory, and of logs."""
    words = ["table1", "models=[flowhn_fac]", "size=tiny", "size.d_model=16", "data=random", "seq_len=16"]
    words += ["vocab_size=300", "global_batch_tokens=16", f"budget={16 * steps}", "eval=none", "trainer=cpu"]
    words += [f"output_dir={folder / 'outputs'}", f"cache_dir={folder / 'cache'}"]
    told = subprocess.run(
        _command("flowhn.reproduce", "--dry-run", *words),
        capture_output=True,
        text=True,
        check=True,
        env=_environment(),
    ).stdout
    begun, output = time.monotonic(), folder / "output.log"
    with output.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            _command("flowhn.reproduce", *words), stdout=log, stderr=subprocess.STDOUT, env=_environment()
        )
    watch = Watch(process.pid, folder / "outputs", 0.1)
    watch.start()
    first = 0  # sample at which training began (it names its precision)
    while process.poll() is None:
        time.sleep(0.1)
        if not first and "32-true" in output.read_text(encoding="utf-8"):
            first = len(watch.samples)
    watch.stop()
    if process.returncode:
        raise RuntimeError(f"training ended with {process.returncode}: {output.read_text(encoding='utf-8')[-500:]}")
    run = next((folder / "outputs" / "runs").iterdir())
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    # Up to the last validation, by the record: what writes the weights afterwards takes 15 to 25 MB more, and is no growth.
    began, (*_, lasted) = watch.samples[first][0], record["losses"]["val"][-1]
    during = [rss for moment, rss, *_ in watch.samples[first:] if moment - began <= lasted]
    positions = [(index / len(during), rss) for index, rss in enumerate(during)]
    memory = {
        "steps": record["steps"],
        "parameters": record["parameters"],
        "command": " ".join(["flowhn-reproduce", *words[:-2]]),
    }
    memory |= {"seconds": time.monotonic() - begun, "peak_rss_bytes": watch.peak()}
    memory["unit_of_slope"] = "bytes per 1,000 steps, taken as equally long"
    memory |= slope(positions, steps / 1000)
    return memory, _logs(run, told, watch.peak_disk, folder, output, record["steps"])


def _logs(run: Path, told: str, peak: int, folder: Path, output: Path, steps: int) -> dict[str, Any]:
    metrics = run / "metrics.csv"
    lines = metrics.read_text(encoding="utf-8").count("\n")
    running, after = _announced(told)
    cache = re.search(r"prepared data .*?: ([\d.,]+) (GB|MB|kB|B) while it is made, ([\d.,]+) (GB|MB|kB|B) after", told)
    return {
        "steps": steps,
        "metrics_csv_bytes": metrics.stat().st_size,
        "metrics_csv_lines": lines,
        "terminal_output_bytes": output.stat().st_size,
        "dry_run_disk_while_running_bytes": running,
        "dry_run_disk_after_bytes": after,
        "dry_run_data_cache_bytes": cache and float(cache[3].replace(",", "")) * SIZES[cache[4]],
        "written_at_most_bytes": peak,
        "run_folder_bytes": disk_bytes(run),
        "files_bytes": {path.name: path.stat().st_size for path in sorted(run.iterdir()) if path.is_file()},
        "data_cache_bytes": disk_bytes(folder / "cache"),
    }


def _announced(told: str) -> tuple[float, float]:
    """Bytes while running and after, from the table that ``--dry-run`` draws: the row's two sizes with a unit."""
    for line in told.splitlines():
        if "flowhn_fac" in line:
            sizes = re.findall(r"([\d.,]+) (GB|MB|kB|B)\b", line)
            if len(sizes) >= 2:
                running, after = (float(number.replace(",", "")) * SIZES[unit] for number, unit in sizes[:2])
                return running, after
    raise RuntimeError("the dry run names no disk sizes")


class _Bytes:
    """A byte-level tokenizer; the adapter asks for no more."""

    eos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def evaluation(*, rounds: int) -> dict[str, Any]:
    """Score ``REQUESTS`` questions of changing lengths ``rounds`` times in this process; memory after each round."""
    import torch

    from flowhn.config import build_model, compose, to_dict
    from flowhn.evaluation.lm import FlowHNLM

    torch.set_num_threads(1)
    words = ["size=tiny", "size.d_model=16", "data=random", "seq_len=64", "vocab_size=300", "eval=none", "trainer=cpu"]
    model = build_model(to_dict(compose("train", words))).eval()
    batches = 0
    body = model.body

    def counted(ids: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        return body(ids)

    model.body = counted
    adapter = FlowHNLM(model, _Bytes(), max_length=64, batch_tokens=128)
    generator = np.random.default_rng(0)
    process, samples, begun = psutil.Process(), [], time.monotonic()
    for index in range(rounds):
        sizes = generator.integers(1, 50, size=(REQUESTS, 2))
        ids = [[generator.integers(256, size=n).tolist() for n in pair] for pair in sizes]
        adapter._loglikelihood_tokens([(None, *pair) for pair in ids])
        samples.append((index / rounds, process.memory_info().rss))
    out = {"rounds": rounds, "batches": batches, "requests": rounds * REQUESTS, "seconds": time.monotonic() - begun}
    return out | {"unit_of_slope": "bytes per 1,000 batches"} | slope(samples, batches / 1000)


def measure(part: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One of ``PARTS``; the training part gives the logs too."""
    if part == "data_preparation":
        return {
            part: data_preparation(
                folder,
                n_bytes=int(args.corpus_bytes),
                n_files=4,
                seed=0,
                vocab_size=args.vocab_size,
                compare=args.compare,
            )
        }
    if part == "training":
        trained, logs = training(folder, steps=args.steps)
        return {part: trained, "logs": logs}
    return {part: evaluation(rounds=args.rounds)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--corpus-bytes", type=float, default=2e9)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=EVALUATION_ROUNDS, help="evaluation rounds")
    parser.add_argument("--vocab-size", type=int, default=32_768, help="of the tokenizer trained on the corpus")
    parser.add_argument("--work", type=Path, help="where temporary files go; default: the system's temporary folder")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these, keep the file's others")
    parser.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, default=True, help="prepare once more, unkilled"
    )
    args = parser.parse_args(argv)
    from flowhn.benchmark.timing import cpu_name
    from flowhn.reporting.record import environment

    out = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in args.only:
        with tempfile.TemporaryDirectory(dir=args.work, prefix="flowhn-long-run-") as name:
            begun = os.getloadavg()[0]
            out |= measure(part, Path(name), args)
            out[part]["load_average_before_and_after"] = [begun, os.getloadavg()[0]]
        about = environment()
        commits = {name: commit for name, commit in (out.get("commit") or {}).items() if name in PARTS}
        out |= {"commit": commits | {part: about["git"]["commit"]}, "versions": about["versions"]}
        out["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
        out["failures"] = failures(out)
        temporary = args.out.with_suffix(".new")
        temporary.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, args.out)
    for failure in out["failures"]:
        sys.stderr.write(f"failed: {failure}\n")
    return 1 if out["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
