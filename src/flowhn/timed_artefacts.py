"""Artefacts that are timed, not trained (figure4, scaling_size, scaling_length): ``flowhn-bench`` in a process of its own.

The folder of such an artefact holds copies of the benchmark records behind it and, where the YAML asks for counts,
``counts.json`` with parameters and FLOPs of every size, counted on the meta device.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowhn.artefacts import Artefact, last_wins, preset
from flowhn.config import build_model, compose, config_dir, to_dict
from flowhn.errors import UserError
from flowhn.reporting.scaling import COUNTS
from flowhn.run_folder import write_json


def bench_words(artefact: Artefact, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The budget's name and the words of the ``flowhn-bench`` command behind an artefact.

    Raises:
        UserError: a key or value that ``flowhn-bench`` does not know.
    """
    for word in overrides:
        if word.startswith(("seeds=", "seed=[")):
            raise UserError(
                f"{word}: {artefact.name} is timed, not trained; repeat=1 (2, 3, ...) measures again as records of their own"
            )
    budget, given, overrides = preset(artefact, overrides)
    # Timing reads no text, and flowhn-bench has no logger: reproduce tells W&B of the artefact.
    overrides = [word for word in overrides if not word.startswith(("cache_dir=", "logger=", "logger."))]
    overrides = [f"sizes=[{word[5:]}]" if word.startswith("size=") else word for word in overrides]
    words = last_wins([f"bench={artefact.bench['case']}", *given.get("overrides", ()), *overrides])
    compose("bench", words)
    return budget, words


def tracking_config(artefact: Artefact, overrides: Sequence[str]) -> dict[str, Any]:
    """What :func:`flowhn.run_tracking.track_artefact` reads: the user's ``logger=``, ``output_dir=`` and ``seed=``."""
    words = [word for word in overrides if word.startswith(("logger=", "logger.", "output_dir=", "seed="))]
    return to_dict(compose("train", [*words, f"artefact={artefact.name}"]))


def command(words: Sequence[str]) -> str:
    """The command as a user would type it."""
    return shlex.join(["flowhn-bench", *words])


def measure(words: Sequence[str], *, force: bool = False) -> int:
    """Time what has no record yet; returns flowhn-bench's exit code. ``force`` deletes the records first."""
    if force:
        shutil.rmtree(_records(words), ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "flowhn.bench", *words], stdout=subprocess.DEVNULL, check=False)
    return done.returncode


def _records(words: Sequence[str]) -> Path:
    config = to_dict(compose("bench", words))
    return Path(config["output_dir"]) / "bench" / config["bench"]["name"] / "records"


def collect(artefact: Artefact, budget: str, words: Sequence[str]) -> Path | None:
    """Put the records, and the counts where the YAML asks for them, into the artefact's folder; None without any.

    ``bench.committed`` names a folder of ``experiments`` whose records join (a GPU's, on a laptop); one that was measured
    here replaces it.
    """
    config = to_dict(compose("bench", words))
    folder = Path(config["output_dir"]) / artefact.name / budget
    found: dict[str, Path] = {}
    committed = artefact.bench.get("committed") if budget != "smoke" else None
    if committed:
        for path in sorted((config_dir().parent / "experiments" / committed / "records").glob("*.json")):
            found[path.name] = path
    found |= {path.name: path for path in sorted(_records(words).glob("*.json"))}
    sizes = artefact.bench.get("counts") or ()
    if not found and not sizes:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "records").mkdir(parents=True)
    for name, path in found.items():
        shutil.copyfile(path, folder / "records" / name)
    if sizes:
        write_json(folder / COUNTS, count_cells(artefact.bench["case"], sizes))
    return folder


def count_cells(case: str, sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Parameters and training FLOPs per token (at the size's own sequence length) of each cell of a benchmark."""
    import torch

    cells = OmegaConf.to_container(OmegaConf.load(config_dir() / "bench" / f"{case}.yaml"))["cells"]
    counted = []
    for size in sizes:
        for cell, words in cells.items():
            config = to_dict(compose("train", [*words, f"size={size}", "data=random", "eval=none"]))
            with torch.device("meta"):
                model = build_model(config)
                flops = 3 * model.flops(config["seq_len"]) / config["seq_len"]
            counted.append(
                {"cell": cell, "size": size, "seq_len": config["seq_len"], "parameters": model.num_parameters(),
                 "flops_per_token": flops}
            )  # fmt: skip
    return counted
