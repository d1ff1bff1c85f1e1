"""The tables of docs/scaling.md, computed from ``scaling_formulas.py`` and the committed speed records.

python scripts/scaling.py            write the tables between the markers of docs/scaling.md
python scripts/scaling.py --check    exit 1 where a table differs from what the formulas give now
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import scaling_formulas as formulas
from scaling_formulas import Cluster, Job, Shape

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
RECORDS = ROOT / "experiments" / "figure4"
GB = 1e9

B1 = Shape("1B", 2048, 8192, 6, 32, 8, 65_536, 1024)
B7 = Shape("7B", 4096, 11_264, 14, 32, 8, 65_536, 4096)
CLUSTER = Cluster()
ASSUMED_MFU = 0.40  # of one GPU, where no record says
JOBS = (
    Job(B1, 8, "ddp", 8),
    Job(B1, 8, "fsdp", 8),
    Job(B1, 64, "ddp", 1),
    Job(B1, 64, "ddp", 16),
    Job(B1, 512, "ddp", 1),
    Job(B1, 512, "ddp", 8),
    Job(B1, 512, "hsdp", 8),
    Job(B7, 8, "ddp", 1, 128),
    Job(B7, 8, "fsdp", 4, 32),
    Job(B7, 8, "fsdp", 4, 32, checkpointed=True),
    Job(B7, 64, "fsdp", 4, 4),
    Job(B7, 512, "fsdp", 2),
    Job(B7, 512, "hsdp", 2),
)
LONG = (replace(B1, seq_len=32_768), replace(B7, seq_len=131_072))


def records() -> list[dict[str, Any]]:
    """Finished bf16 speed records of FlowHN with FAC_Split on an H200 as this project trains it, smallest model first."""
    found = []
    for path in sorted(RECORDS.glob("*/records/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        wanted = (record.get("cell"), record.get("status"), record.get("protocol"), record.get("precision"))
        right = wanted == ("flowhn_fac", "done", "optimised", "bf16-mixed") and record.get("peer") is None
        if right and "H200" in record["device"]["name"] and record.get("mfu"):
            found.append(record)
    return sorted(found, key=lambda record: (record["parameters"], record["seq_len"], record["repeat"], -record["mfu"]))


def single_gpu_mfu(shape: Shape) -> tuple[float, str]:
    """MFU that one GPU reaches alone, and where the figure is from: the record of the nearest size, else the assumption."""
    known = [record for record in records() if record["seq_len"] == 1024]
    if not known:
        return ASSUMED_MFU, f"assumed, {ASSUMED_MFU:.0%}: no record"
    best = min(known, key=lambda record: abs(record["parameters"] - shape.parameters))
    near = 0.9 < best["parameters"] / shape.parameters < 1.1
    label = "measured" if near else f"assumed as measured at {best['size']}"
    return best["mfu"], f"{label} ({best['batch']} x {best['seq_len']} tokens, commit {best['git']['commit'][:7]})"


def record_shape(record: dict[str, Any]) -> Shape:
    """The shape that a speed record was measured with."""
    model = record["config"]["model"]
    block = model["blocks"]["parallel"]
    heads = block["attention"]["n_heads"], block["attention"]["n_kv_heads"]
    return Shape(
        record["size"],
        model["d_model"],
        block["d_ff"],
        model["n_layers"],
        *heads,
        model["vocab_size"],
        record["seq_len"],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def _gb(number: float) -> str:
    return f"{number / GB:,.2f}" if number < 10 * GB else f"{number / GB:,.1f}"


def _job(job: Job) -> str:
    more = f" x {job.accumulate}" if job.accumulate > 1 else ""
    return f"{job.shape.name}, {job.gpus}, {job.strategy}, {job.rows}{more}" + (
        ", recomputed" if job.checkpointed else ""
    )


def table_shapes() -> str:
    rows = []
    for shape in (B1, B7):
        sizes = (
            f"D {shape.d_model}, d_ff {shape.d_ff}, {shape.n_layers} blocks, heads {shape.n_heads} / {shape.n_kv_heads}"
        )
        flops = 3 * shape.forward_flops / shape.seq_len
        mfu, source = single_gpu_mfu(shape)
        rows.append([
            shape.name, f"{sizes}, V {shape.vocab_size:,}, T {shape.seq_len:,}", f"{shape.parameters:,}",
            f"{shape.attn_parameters / 1e6:.1f} / {shape.ssm_parameters / 1e6:.1f} / {shape.joint_parameters / 1e6:.1f}",
            f"{shape.n_attn} / {shape.n_ssm}", f"{flops / 1e9:.2f}", f"{mfu:.1%}", source,
        ])  # fmt: skip
    head = ["", "shape", "parameters", "block: attention / SSM / joint, M", "tokens: attention / SSM"]
    return _table([*head, "training GFLOPs per token", "MFU of one GPU", "source"], rows)


def table_memory() -> str:
    rows = []
    for job in JOBS:
        memory = job.memory(CLUSTER)
        fits = "yes" if memory["sum"] < 0.9 * CLUSTER.memory else "no"
        rows.append([_job(job), *(_gb(value) for value in memory.values()), fits])
    return _table(["model, GPUs, strategy, rows", *JOBS[0].memory(CLUSTER), "fits in 90 % of an H200"], rows)


def table_steps() -> str:
    rows = []
    for job in JOBS:
        volume, step = job.volume(CLUSTER), job.step(CLUSTER, single_gpu_mfu(job.shape)[0])
        rows.append([
            _job(job), f"{job.global_tokens:,}", _gb(volume["inside"]), _gb(volume["between"]), _ms(step["compute"]),
            _ms(step["communication"]), _ms(step["exposed"]), _ms(step["update"]), _ms(step["step"]), f"{step['mfu']:.1%}",
            f"{step['tps']:,.0f}",
        ])  # fmt: skip
    head = [
        "model, GPUs, strategy, rows",
        "tokens per step",
        "sent to gather and scatter, GB",
        "sent between copies, GB",
    ]
    head += ["compute, ms", "communication, ms", "of it exposed, ms", "update, ms", "step, ms", "MFU", "tokens/s"]
    return _table(head, rows)


def table_sequence() -> str:
    rows = []
    for shape in LONG:
        for gpus in (2, 4, 8):
            share = (gpus - 1) / gpus
            ours = formulas.kv_bytes(shape, shape.n_attn) * share
            pure = formulas.kv_bytes(shape, shape.seq_len) * share
            rows.append([
                f"{shape.name}, T {shape.seq_len:,}", str(gpus), f"{shape.n_attn:,} / {shape.n_ssm:,}",
                f"{pure / 1e6:,.1f}", f"{ours / 1e6:,.1f}", f"{formulas.state_bytes(shape) / 1e6:.2f}",
                f"{formulas.contiguous_imbalance(shape):.2f}", _gb(shape.activation_bytes() / gpus),
            ])  # fmt: skip
    head = [
        "model",
        "GPUs of a sequence",
        "tokens: attention / SSM",
        "attention in all blocks: keys, values received, MB",
    ]
    head += ["split: the same, MB", "scan state and tail handed on, MB", "slowest over mean"]
    return _table([*head, "activations of a GPU, GB"], rows)


def table_branch() -> str:
    rows = []
    for shape in (B1, B7):
        spared = 2 * 4 * (shape.parameters - formulas.branch_parameters(shape))
        for split in ("fa", "fac", "ae"):
            moved = formulas.moved_tokens(shape, split)
            sent = formulas.branch_bytes_per_token(shape, split)
            between = shape.n_layers - 1
            seconds = 2 * between * CLUSTER.seconds(2 * shape.d_model * moved, 2) if moved else 0.0
            even = "always" if not sent else f"{spared / sent:,.0f}"
            rows.append([
                f"{shape.name}, {split}", f"{moved:,} of {shape.seq_len:,}",
                f"{2 * shape.d_model * moved / shape.seq_len:,.0f}", f"{sent / 1e3:,.1f}", _ms(seconds),
                f"{formulas.branch_parameters(shape) / shape.parameters:.0%}", _gb(spared), even,
            ])  # fmt: skip
    head = ["model, split", "tokens that change branch", "bytes per token and block, one way", "kB per token and step"]
    head += ["exchanges of a sequence, ms", "parameters on a GPU", "gradient bytes spared, GB"]
    return _table([*head, "sends less up to, tokens per pair and step"], rows)


def table_pairs() -> str:
    """The smallest step of the 1B's published batch: one sequence per GPU, or per pair of GPUs."""
    mfu, _ = single_gpu_mfu(B1)
    single = Job(B1, 64, "ddp", 1)
    rows = []
    for name, split in (("64 GPUs, a sequence each", None), ("128 GPUs, a sequence per pair, fac", "fac")):
        step = single.step(CLUSTER, mfu)
        compute, reduced, kept = step["compute"], single.volume(CLUSTER)["between"], B1.parameters
        sent = 0.0
        if split:
            compute *= formulas.pair_flops(B1) / B1.forward_flops
            kept = formulas.branch_parameters(B1)
            reduced *= kept / B1.parameters
            moved = 2 * B1.d_model * formulas.moved_tokens(B1, split)
            sent = 2 * (B1.n_layers - 1) * CLUSTER.seconds(moved, 2)
        reduce = CLUSTER.seconds(reduced, 64, exchanges=B1.n_layers)
        exposed = max(0.0, reduce - 2 / 3 * compute)
        update = step["update"] * kept / B1.parameters
        total = compute + sent + exposed + update
        rows.append([name, _ms(compute), _ms(sent), _ms(exposed), _ms(update), _ms(total), _gb(16 * kept)])
    head = ["1B, 65,536 tokens per step", "compute, ms", "between branches, ms", "gradients exposed, ms", "update, ms"]
    return _table([*head, "step, ms", "weights, gradients, AdamW of a GPU, GB"], rows)


def table_checked() -> str:
    """The memory formula against measured peaks of one GPU."""
    rows = []
    for record in records():
        shape = record_shape(record)
        predicted = Job(shape, 1, "ddp", record["batch"]).memory(CLUSTER)["sum"]
        counted = 3 * shape.forward_flops / shape.seq_len
        rows.append([
            f"{record['size']}, {record['batch']} x {record['seq_len']}", _gb(predicted), _gb(record["peak_bytes"]),
            f"{predicted / record['peak_bytes'] - 1:+.1%}", f"{shape.parameters - record['parameters']:+,}",
            f"{counted / record['flops_per_token'] - 1:+.2%}", f"{record['tps']:,.0f}", f"{record['mfu']:.1%}",
        ])  # fmt: skip
    head = ["record: size, batch", "memory by formula, GB", "measured, GB", "difference", "parameters, difference"]
    return _table([*head, "FLOPs per token, difference", "tokens/s measured", "MFU measured"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "shapes": table_shapes,
    "memory": table_memory,
    "steps": table_steps,
    "sequence": table_sequence,
    "branch": table_branch,
    "pairs": table_pairs,
    "checked": table_checked,
}


def render(text: str) -> str:
    """The document with each table between its markers made anew.

    Raises:
        ValueError: a marker is missing.
    """
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"docs/scaling.md needs the markers of table {name} once")
        table = make()
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the tables are stale")
    args = parser.parse_args(argv)
    old = DOCUMENT.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        if old != new:
            sys.stderr.write("docs/scaling.md is stale: run python scripts/scaling.py\n")
        return int(old != new)
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
