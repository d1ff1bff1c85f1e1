"""Tables and figures of ``flowhn-bench``, from its records alone.

A record is a JSON object: what was asked (``case, cell, size, seq_len, protocol, peer, repeat, overrides``), where
(``device, versions, git, kernels``), and what came out (``status`` and, when it is ``done``, the figures). ``sha256`` guards it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting.sealed import read_sealed, write_sealed
from flowhn.reporting.style import long_name

SCHEMA = "flowhn-bench-1"
BASELINES = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba")
SIZES = ("tiny", "135m", "350m", "1b")
# What the project set out to reach on one H200 at 1,024 tokens, by cell and size: tokens/s.
GOALS_H200 = {
    ("flowhn_fac", "135m"): 1_050_000, ("flowhn_fac", "350m"): 350_000, ("flowhn_fac", "1b"): 135_000,
    ("flowhn_fac_mamba2", "135m"): 1_050_000, ("flowhn_fac_mamba2", "350m"): 375_000, ("flowhn_fac_mamba2", "1b"): 155_000,
}  # fmt: skip
GOAL_SHARE = {"135m": 0.53, "350m": 0.52, "1b": 0.69}
GOAL_LEAD = {"135m": 1.15, "350m": 1.25, "1b": 1.5}
GOAL_PEERS = {"llama": 1.25, "mamba1": 1.3, "mamba2": 1.5}
# The published code's FAC_Split (mode D, fp32, eager) at its fastest batch (16; 4) on one H200, 2026-11: tokens/s and our goal.
PUBLISHED_H200 = {"135m": (96_200, 10.9), "1b": (11_700, 11.0)}
_CASES_WITH_GOALS = ("figure4", "peers", "length")  # others time variants at batches of their own
_LABELS = {
    "flowhn_fac_mamba2": "FlowHN FAC_Split, Mamba-2 branch",
    "fac_overlap": "FlowHN FAC_Split, two streams",
    "fac_mamba2_overlap": "FlowHN FAC_Split, Mamba-2 branch, two streams",
    "fac_flops": "FlowHN FAC_Split, cut by FLOPs",
    "fac_time": "FlowHN FAC_Split, cut by measured time",
    **{f"fac_0{n}": f"FlowHN FAC_Split, {n}0 % to attention" for n in range(1, 10)},
}
GOAL_LENGTH = (8192, 85.0)  # at that length, % of FAC's tokens/s at 1,024


def write_bench_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record atomically, with the hash that :func:`read_bench_record` checks."""
    write_sealed(path, content, schema=SCHEMA)


def read_bench_record(path: Path) -> dict[str, Any]:
    """Read and check a record; raises UserError as :func:`~flowhn.reporting.sealed.read_sealed`."""
    return read_sealed(path, schema=SCHEMA)


def find_bench_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder ``records``, sorted by name."""
    return [read_bench_record(path) for path in sorted(Path(folder).glob("*.json"))]


def label(cell: str) -> str:
    """A cell's name for readers."""
    if cell.startswith("peer_"):
        return f"transformers {long_name(cell.removeprefix('peer_'))}"
    return _LABELS.get(cell) or long_name(cell)


def bench_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each cell, size, length and protocol: of the batches that were measured, the fastest one; its repeats are
    pooled (median, with the spread over them).

    Columns: model, size, seq_len, protocol, batch, parameters, tps, spread (half the range of windows and repeats over the
    median, %), mfu and share_of_matmul (%), peak_gib, first_step_s, status.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["cell"], record["size"], record["seq_len"], record["protocol"])
        groups.setdefault(key, []).append(record)
    rows = []
    for (cell, size, seq_len, protocol), members in groups.items():
        done = _best_batch([record for record in members if record["status"] == "done"])
        row = {
            "cell": cell,
            "model": label(cell),
            "size": size,
            "seq_len": seq_len,
            "protocol": protocol,
            "runs": len(done),
        }
        if not done:
            rows.append(row | {"status": f"{members[0]['status']}: {members[0].get('reason', '')}"})
            continue
        first = done[0]
        tokens = first["batch"] * seq_len
        speeds = [tokens / seconds for record in done for seconds in record["window_step_seconds"]]
        tps = pd.Series([record["tps"] for record in done]).median()
        rows.append(
            row
            | {
                "status": "done",
                "batch": first["batch"],
                "parameters": first["parameters"],
                "tps": tps,
                "spread": 100 * (max(speeds) - min(speeds)) / 2 / tps,
                "mfu": None
                if first["peak_flops"] is None
                else 100 * tps * first["flops_per_token"] / first["peak_flops"],
                "share_of_matmul": pd.Series([100 * record["share_of_matmul"] for record in done]).median(),
                "peak_gib": None if first["peak_bytes"] is None else first["peak_bytes"] / 2**30,
                "first_step_s": first.get("cold_first_step_seconds", first["first_step_seconds"]),
            }
        )
    order = {size: number for number, size in enumerate(SIZES)}
    rows.sort(key=lambda row: (order.get(row["size"], 9), row["protocol"], row["seq_len"]))
    return pd.DataFrame(rows)


def _best_batch(done: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of the batch with the highest median tokens/s."""
    speeds: dict[int, list[float]] = {}
    for record in done:
        speeds.setdefault(record["batch"], []).append(record["tps"])
    best = max(speeds, key=lambda batch: median(speeds[batch]), default=None)
    return [record for record in done if record["batch"] == best]


def goals(frame: pd.DataFrame) -> pd.DataFrame:
    """Goal beside reached on an H200, at 1,024 tokens unless said; empty where nothing of it was measured."""
    optimised = frame[(frame.status == "done") & (frame.protocol == "optimised")]
    if optimised.empty:  # nothing measured: the columns of figures are not there either
        return pd.DataFrame()
    done = optimised[optimised.seq_len == 1024]
    speed = {(row.cell, row.size): row for row in done.itertuples()}
    rows: list[dict[str, Any]] = []

    def add(what: str, size: str, goal: float, reached: float, unit: str) -> None:
        rows.append(
            {"what": what, "size": size, "goal": goal, "reached": reached, "unit": unit, "met": reached >= goal}
        )

    for (cell, size), goal in GOALS_H200.items():
        if (cell, size) in speed:
            add(label(cell), size, goal, speed[cell, size].tps, "tokens/s")
    for size, goal in GOAL_SHARE.items():
        ours = [speed[cell, size] for cell in ("flowhn_fac", "flowhn_fac_mamba2") if (cell, size) in speed]
        if not ours:
            continue
        add(
            "FAC, better branch, of the measured matrix-product rate",
            size,
            100 * goal,
            max(r.share_of_matmul for r in ours),
            "%",
        )
        rivals = [speed[cell, size] for cell in BASELINES if (cell, size) in speed]
        if rivals:
            best = max(rivals, key=lambda row: row.tps)
            lead = max(row.tps for row in ours) / best.tps
            add(
                f"FAC, better branch, over the fastest of {len(rivals)} baselines ({best.model})",
                size,
                GOAL_LEAD[size],
                lead,
                "x",
            )
        if size in PUBLISHED_H200:
            theirs, goal = PUBLISHED_H200[size]
            add(
                "FAC, better branch, over the published code at its best batch",
                size,
                goal,
                max(r.tps for r in ours) / theirs,
                "x",
            )
    for cell, goal in GOAL_PEERS.items():
        pair = [speed.get((name, "135m")) for name in (cell, f"peer_{cell}")]
        if all(row is not None for row in pair):
            add(
                f"{label(cell)} over transformers', batch {pair[0].batch:.0f}",
                "135m",
                goal,
                pair[0].tps / pair[1].tps,
                "x",
            )
    return pd.DataFrame(rows + _length_goal(optimised))


def _length_goal(optimised: pd.DataFrame) -> list[dict[str, Any]]:
    """What FAC keeps of its rate at a long sequence; no row where one of the two lengths was not measured."""
    long, goal = GOAL_LENGTH
    fac = optimised[optimised.cell == "flowhn_fac"].set_index(["size", "seq_len"]).tps
    kept = {
        size: 100 * fac[size, long] / fac[size, 1024] for size, at in fac.index if at == long and (size, 1024) in fac
    }
    what = f"FAC at {long:,} tokens, of its rate at 1,024"
    return [
        {"what": what, "size": size, "goal": goal, "reached": share, "unit": "%", "met": share >= goal}
        for size, share in kept.items()
    ]


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A :func:`bench_table` with its numbers as text and heads for readers."""
    formats = {
        "batch": "{:.0f}", "parameters": "{:,.0f}", "tps": "{:,.0f}", "spread": "{:.1f}", "mfu": "{:.1f}",
        "share_of_matmul": "{:.1f}", "peak_gib": "{:.1f}", "first_step_s": "{:.0f}",
    }  # fmt: skip
    shown = frame.drop(columns="cell").copy()
    for column, style in formats.items():
        if column in shown:
            shown[column] = ["" if pd.isna(value) else style.format(value) for value in shown[column]]
    names = {
        "tps": "tokens/s",
        "spread": "± %",
        "mfu": "MFU %",
        "share_of_matmul": "of matmul %",
        "peak_gib": "GiB",
        "first_step_s": "first step s",
    }
    return shown.rename(columns=names)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write_bench(records: Sequence[Mapping[str, Any]], folder: Path, *, title: str) -> list[Path]:
    """``table.md``, ``table.csv`` and ``figure4.png`` or ``length.png`` in ``folder``; returns what was written.

    Raises:
        UserError: no records.
    """
    if not records:
        raise UserError("there is no benchmark record to draw")
    from flowhn.reporting.bench_figures import length_figure, throughput_figure

    frame = bench_table(records)
    folder.mkdir(parents=True, exist_ok=True)
    first = next((record for record in records if record["status"] == "done"), records[0])
    versions, commit = first["versions"], (first["git"]["commit"] or "unknown")[:7]
    parts = [
        f"# {title}",
        f"{first['device']['name']}, torch {versions.get('torch')}, commit {commit}. Training steps "
        "(forward, backward, clipping, AdamW) on uniformly random token ids; the median of the timed windows. ± is half the "
        "range over all windows. MFU is against the device's dense datasheet peak, the next column against a matrix product "
        "measured in the same process.",
        readable(frame).to_markdown(index=False, disable_numparse=True),
    ]
    reached = goals(frame)
    has_goals = first.get("case", "figure4") in _CASES_WITH_GOALS and "H200" in str(first["device"]["name"])
    if not reached.empty and has_goals:
        shown = reached.assign(
            goal=[_short(value) for value in reached.goal], reached=[_short(value) for value in reached.reached],
            met=["yes" if met else "no" for met in reached.met],
        )  # fmt: skip
        parts += ["**Goal and reached**", shown.to_markdown(index=False, disable_numparse=True)]
    parts += [_profile_text(record) for record in records if record.get("profile")]
    written = [folder / "table.md", folder / "table.csv"]
    written[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    frame.to_csv(written[1], index=False)
    done = frame[frame.status == "done"]
    if not done.empty:
        by_length = done.seq_len.nunique() > 1
        path = folder / ("length.png" if by_length else "figure4.png")
        (length_figure if by_length else throughput_figure)(done, path)
        written.append(path)
    return written


def _profile_text(record: Mapping[str, Any]) -> str:
    profile = record["profile"]
    total = profile["kernel_ms"] or 1.0
    lines = [f"| {kind} | {ms:.2f} | {100 * ms / total:.1f} |" for kind, ms in profile["kinds"].items()]
    return "\n".join(
        [
            f"**Where a step's time goes: {label(record['cell'])}, {record['size']}, batch {record['batch']}**",
            "",
            "| kind of kernel | ms | % |",
            "|:--|--:|--:|",
            *lines,
            "",
            f"{profile['kernel_ms']:.1f} ms of kernels in {profile['busy_ms']:.1f} ms; "
            f"{profile['overlap_ms']:.1f} ms ran beside another kernel.",
        ]
    )
