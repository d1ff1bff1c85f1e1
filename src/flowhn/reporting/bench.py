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
SIZES = ("tiny", "135m", "350m", "1b")
_LABELS = {
    "flowhn_fac_mamba2": "FlowHN FAC_Split, Mamba-2 branch",
    "fac_overlap": "FlowHN FAC_Split, two streams",
    "fac_mamba2_overlap": "FlowHN FAC_Split, Mamba-2 branch, two streams",
    "fac_flops": "FlowHN FAC_Split, cut by FLOPs",
    "fac_time": "FlowHN FAC_Split, cut by measured time",
    "fac_bf16_residual": "FlowHN FAC_Split, bf16 residual",
    "fac_mamba2_bf16_residual": "FlowHN FAC_Split, Mamba-2 branch, bf16 residual",
    "fac_mamba2_64": "FlowHN FAC_Split, Mamba-2 branch, cut in multiples of 64",
    "fac_mamba2_triton": "FlowHN FAC_Split, Mamba-2 branch, our Triton kernels",
    "fac_mamba2_mamba_ssm": "FlowHN FAC_Split, Mamba-2 branch, mamba_ssm's kernels",
    **{f"fac_0{n}": f"FlowHN FAC_Split, {n}0 % to attention" for n in range(1, 10)},
}


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
    """One row for each cell, size, length and protocol, from the records that :func:`counted` takes of it: medians over
    repeats, with the spread over them.

    Columns: model, size, seq_len, protocol, runs, status, batch, parameters, tps, spread (half the range of windows and
    repeats over the median, %), mfu (%; where no datasheet has the device's peak, against the fastest product that any of
    the records measured), share_of_matmul (%; none on a CPU, where a product's rate changes by a factor of three between
    processes), peak_gib, and of the first step first_step_cold_s (compiled beside other cells), first_step_warm_s (compiled
    before, or not compiled at all) and first_step_unknown_s (not prepared: what was in the caches is not on record).
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        key = (record["cell"], record["size"], record["seq_len"], record["protocol"])
        groups.setdefault(key, []).append(record)
    peaks = _measured_peaks(records)
    rows = []
    for (cell, size, seq_len, protocol), members in groups.items():
        row = {"cell": cell, "model": label(cell), "size": size, "seq_len": seq_len, "protocol": protocol}
        done = counted(members)
        row["runs"] = len(done)
        if done:
            rows.append(row | _figures(done, peaks))
        else:
            rows.append(row | {"status": f"{members[0]['status']}: {members[0].get('reason', '')}"})
    order = {size: number for number, size in enumerate(SIZES)}
    rows.sort(key=lambda row: (order.get(row["size"], 9), row["protocol"], row["seq_len"]))
    return pd.DataFrame(rows)


def _figures(done: Sequence[Mapping[str, Any]], peaks: Mapping[Any, float]) -> dict[str, Any]:
    first, tps = done[0], median(record["tps"] for record in done)
    tokens = first["batch"] * first["seq_len"]
    speeds = [tokens / seconds for record in done for seconds in record["window_step_seconds"]]
    peak = peaks.get(_peak_key(first), first["peak_flops"])
    on_cpu = first["device"].get("type") == "cpu"
    return {
        "status": "done",
        "batch": first["batch"],
        "parameters": first["parameters"],
        "tps": tps,
        "spread": 100 * (max(speeds) - min(speeds)) / 2 / tps,
        "mfu": None if peak is None else 100 * tps * first["flops_per_token"] / peak,
        "share_of_matmul": None if on_cpu else median(100 * record["share_of_matmul"] for record in done),
        "peak_gib": None if first["peak_bytes"] is None else first["peak_bytes"] / 2**30,
        **_first_steps(done),
    }


def _first_steps(done: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds of the first step by what was compiled before it: only a prepared record tells both."""
    prepared = [record for record in done if record.get("cold_first_step_seconds") is not None]
    eager = [record for record in done if record.get("compile") is False and record not in prepared]
    rest = [record for record in done if record not in prepared and record not in eager]
    return {
        "first_step_cold_s": median(r["cold_first_step_seconds"] for r in prepared) if prepared else None,
        "first_step_warm_s": median(r["first_step_seconds"] for r in prepared or eager) if prepared or eager else None,
        "first_step_unknown_s": max(r["first_step_seconds"] for r in rest) if rest and not prepared else None,
    }


def counted(members: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a cell's records at one size, length and protocol those that are repeats of each other and count: finished, of the
    commit that was timed last, with its fastest setting (batch and overrides)."""
    done = [record for record in members if record["status"] == "done"]
    if not done:
        return []
    last = commit_of(max(done, key=lambda record: str(record.get("created", ""))))
    settings: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in done:
        if commit_of(record) == last:
            settings.setdefault((record["batch"], *(record.get("overrides") or ())), []).append(record)
    return max(settings.values(), key=lambda own: median(record["tps"] for record in own))


def commit_of(record: Mapping[str, Any]) -> str:
    """The seven letters of a record's commit, or ``unknown``."""
    return ((record.get("git") or {}).get("commit") or "unknown")[:7]


def _peak_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        record["device"].get("name"),
        record["device"].get("count"),
        record.get("peak_source"),
        record.get("precision"),
    )


def _measured_peaks(records: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """The fastest product that the records' processes measured, for each device without a datasheet peak."""
    found: dict[tuple[Any, ...], float] = {}
    for record in records:
        if record["status"] == "done" and record["peak_flops"] and "measured" in str(record.get("peak_source")):
            found[_peak_key(record)] = max(found.get(_peak_key(record), 0.0), record["peak_flops"])
    return found


def how_measured(records: Sequence[Mapping[str, Any]]) -> str:
    """What the columns of :func:`readable` are, in the words that hold for these records: of ±, MFU and the first step."""
    done = [record for record in records if record["status"] == "done"]
    frame = bench_table(done)
    parts = ["± is half the range over all windows."]
    peaks = _measured_peaks(done)
    if peaks:
        parts.append(
            f"MFU is against a matrix product, the fastest that any of these processes measured on the device "
            f"({max(peaks.values()) / 1e12:.2g} TFLOP/s): no datasheet has its peak."
        )
    sheets = sorted(
        {(str(r["peak_source"]), r["peak_flops"]) for r in done if r.get("peak_source") and r["peak_flops"]}
    )
    sheets = [(source, peak) for source, peak in sheets if "measured" not in source]
    if sheets:
        told = ", ".join(f"{source}, {peak / 1e12:,.1f} TFLOP/s" for source, peak in sheets)
        parts.append(f"MFU is against the device's peak ({told}).")
    if done and frame.share_of_matmul.notna().any():
        parts.append("The column after MFU is against a matrix product measured in the same process.")
    if done and frame.first_step_cold_s.notna().any():
        parts.append("First step: compiling, beside other cells; with warm caches, in the timed process after that.")
    if done and frame.first_step_unknown_s.notna().any():
        parts.append("≥: not prepared beforehand; how much was in the machine's caches is not on record.")
    return " ".join(parts)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A :func:`bench_table` with its numbers as text and heads for readers; columns without a number are left out."""
    formats = {
        "batch": "{:.0f}", "parameters": "{:,.0f}", "tps": "{:,.0f}", "spread": "{:.1f}", "mfu": "{:.1f}",
        "share_of_matmul": "{:.1f}", "peak_gib": "{:.1f}", "first_step_cold_s": "{:.0f}", "first_step_warm_s": "{:.1f}",
        "first_step_unknown_s": "≥ {:.0f}",
    }  # fmt: skip
    shown = frame.drop(columns="cell").copy()
    for column, style in formats.items():
        if column in shown:
            shown[column] = ["" if pd.isna(value) else style.format(value) for value in shown[column]]
    if "first_step_unknown_s" in shown:
        unknown = shown.pop("first_step_unknown_s")
        shown["first_step_cold_s"] = shown.first_step_cold_s.where(shown.first_step_cold_s != "", unknown)
    shown = shown.drop(columns=[column for column in formats if column in shown and not (shown[column] != "").any()])
    names = {
        "tps": "tokens/s",
        "spread": "± %",
        "mfu": "MFU %",
        "share_of_matmul": "of matmul %",
        "peak_gib": "GiB",
        "first_step_cold_s": "first step s, compiling",
        "first_step_warm_s": "first step s, warm caches",
    }
    if "first_step_cold_s" not in shown:  # nothing was compiled
        names["first_step_warm_s"] = "first step s"
    if "first_step_cold_s" not in shown:  # nothing was compiled
        names["first_step_warm_s"] = "first step s"
    return shown.rename(columns=names)


def write_bench(records: Sequence[Mapping[str, Any]], folder: Path, *, title: str) -> list[Path]:
    """``table.md``, ``table.csv`` and ``figure4.png`` or ``length.png`` in ``folder``; returns what was written.

    Raises:
        UserError: no records.
    """
    if not records:
        raise UserError("there is no benchmark record to draw")
    from flowhn.reporting.bench_figures import length_figure, throughput_figure
    from flowhn.reporting.goals import goals, readable_goals

    frame = bench_table(records)
    folder.mkdir(parents=True, exist_ok=True)
    first = next((record for record in records if record["status"] == "done"), records[0])
    commits = ", ".join(dict.fromkeys(commit_of(record) for record in records))
    parts = [
        f"# {title}",
        f"{first['device']['name']}, torch {first['versions'].get('torch')}, commit {commits}. Training steps "
        "(forward, backward, clipping, AdamW) on uniformly random token ids; the median of the timed windows. "
        f"{how_measured(records)}",
        readable(frame).to_markdown(index=False, disable_numparse=True),
    ]
    reached = goals(records)
    if not reached.empty:
        parts += ["**Goal and reached**", readable_goals(reached).to_markdown(index=False, disable_numparse=True)]
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
            f"{profile['overlap_ms']:.1f} ms ran beside another kernel. A timed step took "
            f"{1e3 * record['step_seconds']:.1f} ms; the profile is of three later steps, without what lies between kernels.",
        ]
    )
