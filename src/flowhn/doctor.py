"""``flowhn-doctor``: what will be used on this machine and why, what is missing, and how to install it.

Exit code 0 only if the main job (``./reproduce.sh``) can run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from flowhn.cli import run_entry

NEEDED_BYTES = 2 * 10**9  # the laptop run: cache, ten runs with two checkpoints each, and room
_NEEDED_MEMORY = 4 * 10**9
_GPU_EXTRA = "pip install --no-build-isolation 'flowhn[gpu]'   (needs nvcc of torch's CUDA version)"


@dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ok, note (something optional is not there) or fail (the main job cannot run)."""

    topic: str
    state: str
    text: str
    mend: str = ""


def main() -> None:
    """Entry point of ``flowhn-doctor``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flowhn-doctor",
        description="What this machine has, what will be used, what is missing.",
        allow_abbrev=False,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where runs will be written")
    parser.add_argument("--no-hub", action="store_true", help="do not ask whether the Hugging Face hub answers")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(list(argv))
    findings = list(examine(args.output_dir, ask_hub=not args.no_hub))
    if args.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    else:
        _show(findings)
    return int(any(finding.state == "fail" for finding in findings))


def examine(output_dir: Path, *, ask_hub: bool = True) -> Iterator[Finding]:
    """All findings, in the order of what depends on what; a check that breaks is a finding itself."""
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _device, _kernels]
    checks += [_wandb, lambda: _disk(output_dir), _memory, _training]
    checks += [_hub] if ask_hub else []
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # the doctor must reach the end of the list on a broken machine
            first = (str(error).strip().splitlines() or [""])[0]
            name = getattr(check, "__name__", "disk").strip("_")
            yield Finding(
                name, "fail", f"the check broke ({type(error).__name__}: {first})", "install again: rm -rf .venv"
            )


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    mend = "" if good else "PYTHON=/path/to/python3.12 ./reproduce.sh"
    yield Finding("Python", "ok" if good else "fail", f"{version} on {platform.system()} {platform.machine()}", mend)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("flowhn") or ():
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "pip install -e .")
    else:
        yield Finding("packages", "ok", "all that flowhn asks for are there in fitting versions")
    yield Finding("torch", "ok", _torch_text())


def _torch_text() -> str:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return f"{torch.__version__}, built for {built}, {torch.get_num_threads()} CPU threads"


def _device() -> Iterator[Finding]:
    import torch

    from flowhn.benchmark.peaks import compute_dtype, peak_flops
    from flowhn.training import resolve_hardware

    hardware = resolve_hardware({"trainer": {}})
    compiled = ", torch.compile" if hardware.compile else ""
    name = torch.cuda.get_device_name(0) if hardware.device.type == "cuda" else platform.processor() or "CPU"
    yield Finding(
        "device", "ok", f"device=auto takes {hardware.device} ({name}), precision {hardware.precision}{compiled}"
    )
    if hardware.device.type == "cpu" and shutil.which("nvidia-smi"):
        mend = "install a CUDA build of torch: see https://pytorch.org/get-started/locally"
        yield Finding("CUDA", "note", "nvidia-smi is there but this torch sees no CUDA device", mend)
    dtype = compute_dtype(hardware.precision, hardware.device.type)
    peak, source = peak_flops(hardware.device, dtype)
    if peak:
        yield Finding("peak for MFU", "ok", f"{peak / 1e12:,.3g} TFLOP/s ({source})")
    else:
        mend = "trainer.throughput.peak_flops=FLOPS with the datasheet's dense figure"
        yield Finding("peak for MFU", "note", f"{source}: MFU stays empty", mend)


def _kernels() -> Iterator[Finding]:
    from flowhn.benchmark.kernel_checks import MIXERS, check_kernel
    from flowhn.models.kernels import kernel_status, resolve_attention, resolve_ssm, triton_usable
    from flowhn.training import resolve_hardware

    device = resolve_hardware({"trainer": {}}).device
    for package, (usable, reason) in kernel_status().items():
        runs = usable and device.type == "cuda"
        text = reason if runs or not usable else f"{reason}, but it needs CUDA and the device is {device}"
        yield Finding(f"package {package}", "ok" if runs else "note", text, "" if usable else _GPU_EXTRA)
    triton = triton_usable()
    text = "runs here" if triton else "needs an Ampere or newer GPU and a CUDA build of torch, which brings it along"
    yield Finding("package triton", "ok" if triton else "note", text)
    for mixer in MIXERS:
        check = check_kernel(mixer, "auto", device)
        name = f"kernel of {mixer}"
        if mixer == "attention":
            taken, plain = resolve_attention("auto", device.type), "attention=sdpa"
        else:
            taken, plain = resolve_ssm("auto", device.type, has_triton=True), "kernels=torch"
        if check.error is not None:
            yield Finding(name, "fail", f"{taken} does not run here: {check.error}", f"{plain}, or install it again")
        elif not check.correct:
            text = f"{taken} is wrong here: off by {check.difference:.2g} (at most {check.tolerance:g})"
            yield Finding(name, "fail", text, plain)
        else:
            speed = f"{check.tokens_per_second:,.0f} tokens/s forward and backward in a layer of width 64"
            yield Finding(name, "ok", f"auto takes {taken}: off by {check.difference:.1g}, {speed}")


def _disk(output_dir: Path) -> Iterator[Finding]:
    place = output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    if not writable:
        yield Finding("disk", "fail", f"{place} cannot be written", "output_dir=FOLDER cache_dir=FOLDER")
    else:
        enough = free >= NEEDED_BYTES
        text = f"{free / 1e9:,.1f} GB free at {place}; the laptop run needs {NEEDED_BYTES / 1e9:.0f}"
        mend = "" if enough else "free some space, or output_dir= and cache_dir= elsewhere"
        yield Finding("disk", "ok" if enough else "fail", text, mend)
    cache = Path(os.environ.get("FLOWHN_CACHE", output_dir / "cache"))
    sizes = {name: _size(folder) for name, folder in (("data cache", cache), ("runs", output_dir / "runs"))}
    text = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.items())
    yield Finding("outputs", "ok", f"{text}; both may be deleted, runs are then trained again")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    enough = free >= _NEEDED_MEMORY
    text = f"{free / 1e9:,.1f} GB available; the laptop run needs less than {_NEEDED_MEMORY / 1e9:.0f}"
    yield Finding("memory", "ok" if enough else "fail", text, "" if enough else "close other programs")


def _training() -> Iterator[Finding]:
    """One step of every kind of layer through the whole model, where and as precisely as the main job will do it."""
    import torch

    from flowhn.config import build_model, compose, to_dict
    from flowhn.training import resolve_hardware

    config = to_dict(compose("train", ["model=flowhn", "split=fac", "size=tiny"]))
    hardware = resolve_hardware(config)
    kind = hardware.device.type
    model = build_model(config).to(hardware.device)
    ids = torch.randint(config["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(0)).to(hardware.device)
    with torch.autocast(kind, torch.bfloat16, enabled=hardware.precision == "bf16-mixed"):
        logits = model(ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    value = loss.item()
    good = math.isfinite(value)
    text = f"FlowHN tiny, one step on {kind}, precision {hardware.precision}: loss {value:.2f}"
    yield Finding("main job", "ok" if good else "fail", text)


def _hub() -> Iterator[Finding]:
    from flowhn.data.hub import require_hub
    from flowhn.errors import UserError

    try:
        require_hub("gpt2", "model")
    except UserError:
        text = "does not answer: data=slimpajama, eval=paper and eval=code need it; docs, files and random do not"
        yield Finding("Hugging Face hub", "note", text, "data=files data.path=FOLDER eval.data_dir=FOLDER")
    else:
        yield Finding("Hugging Face hub", "ok", "answers")


def _wandb() -> Iterator[Finding]:
    found = importlib.util.find_spec("wandb") is not None
    text = "there, for logger=wandb" if found else "not installed; only logger=wandb needs it"
    yield Finding("package wandb", "ok" if found else "note", text, "" if found else "pip install 'flowhn[wandb]'")


def _show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 1))
    colours = {"ok": "green", "note": "yellow", "fail": "red"}
    for finding in findings:
        text = Text(finding.text)
        if finding.mend:
            text.append(f"\n-> {finding.mend}", style="bold")
        table.add_row(Text(finding.state, style=colours[finding.state]), finding.topic, text)
    console = Console()
    console.print(table)
    failed = [finding.topic for finding in findings if finding.state == "fail"]
    console.print(
        f"the main job cannot run here: {', '.join(failed)}" if failed else "the main job can run here: ./reproduce.sh"
    )


if __name__ == "__main__":
    main()
