"""How parameters, FLOPs and speed grow with size and with sequence length, from benchmark records and counts.

``scaling_size`` shows every size: counted parameters and FLOPs always, tokens/s and MFU where a benchmark record exists, each
device on its own. ``scaling_length`` shows tokens/s over T at constant tokens of a step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from flowhn.errors import UserError
from flowhn.reporting.bench import bench_table, find_bench_records, label
from flowhn.reporting.figures import save
from flowhn.reporting.style import FONT, in_order, look, size_name, sizes_in_order

COUNTS = "counts.json"
SIZE_LIMITS = (
    "Counted figures hold on any device; a speed holds for the device, kernels and software that its record names, and rows of "
    "different devices must not be compared with each other."
)
LENGTH_LIMITS = (
    "Random tokens and a constant number of tokens in a step: cost is measured, not what a longer context teaches."
)
_WIDTH, _DPI = 7.0, 200
_BARS = {"linestyle": "none", "capsize": 2, "elinewidth": 0.7, "capthick": 0.7}
_BARS = {"linestyle": "none", "capsize": 2, "elinewidth": 0.7, "capthick": 0.7}
_RISE = 10.0  # %, from which a rate that rises with T is told
_PLACE = 0.6  # of a size's place that its models take
_HEADS: dict[str, tuple[str, str]] = {
    "model": ("model", "{}"),
    "size_name": ("size", "{}"),
    "parameters": ("parameters", "{:,.0f}"),
    "flops_per_token": ("training FLOPs/token", "{:.3g}"),
    "seq_len": ("T", "{:,.0f}"),
    "device": ("device", "{}"),
    "batch": ("batch", "{:.0f}"),
    "tps": ("tokens/s", "{:,.0f}"),
    "spread": ("± %", "{:.1f}"),
    "mfu": ("MFU %", "{:.1f}"),
    "kept": ("of the shortest T's tokens/s, %", "{:.0f}"),
}


def _measured(folder: Path) -> pd.DataFrame:
    """Finished benchmark records by device: the columns of ``bench_table``, and ``device``, ``flops_per_token``."""
    records = [r for r in find_bench_records(Path(folder) / "records") if r["status"] == "done"]
    devices: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        devices.setdefault(_device(record), []).append(record)
    frames = []
    for device, members in devices.items():
        frame = bench_table(members)
        flops = {(r["cell"], r["size"], r["seq_len"], r["protocol"]): r["flops_per_token"] for r in members}
        keys = zip(frame.cell, frame["size"], frame.seq_len, frame.protocol, strict=True)
        frames.append(frame.assign(device=device, flops_per_token=[flops[key] for key in keys]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _device(record: Mapping[str, Any]) -> str:
    device = record["device"]
    threads = f", {device.get('count')} threads" if device.get("type") == "cpu" else ""
    return f"{device.get('name') or device.get('type')}{threads}"


def size_table(folder: Path) -> pd.DataFrame:
    """``scaling_size``: a row for each model and size, and one more for each device that measured it.

    Columns ``cell, model, size, parameters, flops_per_token`` (training, at the size's own T), ``seq_len, device, batch, tps,
    spread, mfu`` (%); the last six are missing where nothing was measured.

    Raises:
        UserError: neither counts nor a finished record.
    """
    path = Path(folder) / COUNTS
    counts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    measured = _measured(folder)
    rows = []
    for row in measured.to_dict("records"):
        if row["protocol"] == "optimised":
            rows.append({key: row.get(key) for key in _SIZE_COLUMNS})
    have = {(row["cell"], row["size"]) for row in rows}
    rows += [
        {**{key: None for key in _SIZE_COLUMNS}, **count, "model": label(count["cell"])}
        for count in counts
        if (count["cell"], count["size"]) not in have
    ]
    if not rows:
        raise UserError(f"{folder} has neither {COUNTS} nor a finished benchmark record")
    cells, sizes = in_order(row["cell"] for row in rows), sizes_in_order(row["size"] for row in rows)
    rows.sort(key=lambda row: (sizes.index(row["size"]), cells.index(row["cell"]), str(row["device"])))
    frame = pd.DataFrame(rows)
    numbers = ["parameters", "flops_per_token", "seq_len", "batch", "tps", "spread", "mfu"]
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    frame["size_name"] = [size_name(size) for size in frame["size"]]
    return _with_facts(frame, folder, [*_SIZE_SHOWN])


_SIZE_COLUMNS = (
    "cell", "model", "size", "parameters", "flops_per_token", "seq_len", "device", "batch", "tps", "spread", "mfu",
)  # fmt: skip
_SIZE_SHOWN = (
    "model", "size_name", "parameters", "flops_per_token", "device", "seq_len", "batch", "tps", "spread", "mfu",
)  # fmt: skip


def length_table(folder: Path) -> pd.DataFrame:
    """``scaling_length``: tokens/s of each model at each T, by device; ``kept`` is the share (%) of its shortest T's rate.

    Raises:
        UserError: no finished record.
    """
    frame = _measured(folder)
    if frame.empty:
        raise UserError(f"{folder} has no finished benchmark record")
    frame["size_name"] = [size_name(size) for size in frame["size"]]
    order = in_order(frame.cell)
    frame["place"] = [order.index(cell) for cell in frame.cell]
    frame = frame.sort_values(["device", "size", "place", "seq_len"], ignore_index=True)
    first = frame.groupby(["device", "size", "cell"]).tps.transform("first")
    frame["kept"] = 100 * frame.tps / first
    columns = ["cell", "model", "size", "size_name", "seq_len", "device", "batch", "parameters", "flops_per_token", "tps",
               "spread", "mfu", "kept"]  # fmt: skip
    shown = ["model", "size_name", "seq_len", "device", "batch", "flops_per_token", "tps", "spread", "mfu", "kept"]
    return _with_facts(frame[columns], folder, shown)


def _with_facts(frame: pd.DataFrame, folder: Path, shown: Sequence[str]) -> pd.DataFrame:
    records = find_bench_records(Path(folder) / "records")
    unfinished = [
        f"{r['cell']} at {r['size']}, T {r['seq_len']}: {r['status']}" for r in records if r["status"] != "done"
    ]
    devices = [device for device in frame.device.dropna().unique()]
    frame.attrs = {
        "shown": tuple(shown),
        "heads": _HEADS,
        "runs": len(records) - len(unfinished),
        "device": "; ".join(devices),
        "commits": sorted({(r["git"]["commit"] or "unknown")[:7] for r in records}),
        "seconds": sum(r.get("cell_seconds", 0.0) for r in records),
    }
    frame.attrs["notes"] = [scale(frame)]
    if unfinished:
        frame.attrs["notes"].append(f"Not measured: {'; '.join(unfinished)}.")
    return frame


def scale(frame: pd.DataFrame) -> str:
    """What the table was made from, in one sentence."""
    facts = frame.attrs
    if not facts["runs"]:
        return "Counted only: no speed was measured."
    return (
        f"{facts['runs']} cells timed on random tokens, {facts['seconds'] / 60:.1f} minutes in all on {facts['device']}, commit "
        f"{', '.join(facts['commits'])}; ± is half the range over timed windows."
    )


def size_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """FLOPs per token, tokens/s and MFU by size, the models of a size side by side; open markers: a second device."""
    sizes, cells = sizes_in_order(frame["size"]), in_order(frame.cell)
    step = _PLACE / max(1, len(cells) - 1)
    frame = frame.assign(
        place=[
            sizes.index(size) + step * (cells.index(cell) - (len(cells) - 1) / 2)
            for size, cell in zip(frame["size"], frame.cell, strict=True)
        ]
    )
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(_WIDTH, 6.6), dpi=_DPI, layout="constrained")
        axes = figure.subplots(3, 1, sharex=True)
        devices = list(frame.device.dropna().unique())
        panels = (("flops_per_token", "Training FLOPs per token"), ("tps", "Tokens/s"), ("mfu", "MFU (%)"))
        for axis, (column, text) in zip(axes, panels, strict=True):
            for cell, part in frame.groupby("cell", sort=False):
                if column == "flops_per_token":
                    _line(axis, part.drop_duplicates("size"), "place", column, str(cell))
                    continue
                for device, own in part.dropna(subset=[column]).groupby("device", sort=False):
                    _line(axis, own, "place", column, str(cell), is_open=devices.index(device) > 0)
            axis.set_ylabel(text)
            _value_axis(axis, frame[column].dropna(), column)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_title("Counted", loc="left", fontsize=8)
        names = dict(zip(frame["size"], frame.size_name, strict=True))
        axes[-1].set_xticks(range(len(sizes)), [names[size] for size in sizes])
        axes[-1].set_xlim(-0.5, len(sizes) - 0.5)
        axes[-1].set_xlabel("Size (models of a size side by side)")
        if devices:
            told = f"Filled: {devices[0]}" + (f"; open: {', '.join(devices[1:])}" if len(devices) > 1 else "")
            axes[1].set_title(told, loc="left", fontsize=8)
        _legend(figure, axes[0])
        return save(figure, path)


def _value_axis(axis: Axes, values: pd.Series, column: str) -> None:
    """Logarithmic where values differ by more than ten times; MFU, a share, always from zero."""
    if values.empty:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        axis.set_yticks([])
        return
    if column != "mfu" and values.max() > 10 * values.min():
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.1 * values.max())
    if column != "mfu":
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))


def length_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Tokens/s over sequence length, one line for each model and device, and what is kept of the shortest length's rate."""
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(_WIDTH, 3.4), dpi=_DPI, layout="constrained")
        axes = figure.subplots(1, 2)
        devices = list(frame.device.unique())
        for axis, column, text in zip(
            axes, ("tps", "kept"), ("Tokens/s", "Tokens/s, % of the shortest T's"), strict=True
        ):
            for (cell, device), part in frame.groupby(["cell", "device"], sort=False):
                _line(axis, part, "seq_len", column, str(cell), is_open=devices.index(device) > 0)
                if column == "tps":
                    axis.errorbar(
                        part.seq_len, part.tps, yerr=part.tps * part.spread / 100, **_BARS, color=look(str(cell)).color
                    )
            lengths = sorted(frame.seq_len.unique())
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axis.set_ylim(bottom=0)
            axis.set_xlabel("Sequence length T (tokens)")
            axis.set_ylabel(text)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].yaxis.set_major_formatter(EngFormatter(sep=""))
        told = f"filled: {devices[0]}; open: {', '.join(devices[1:])}" if len(devices) > 1 else devices[0]
        axes[0].set_title(f"Bars: range of the timed windows ({told})", loc="left", fontsize=7)
        _legend(figure, axes[0])
        return save(figure, path)


def _line(axis: Axes, part: pd.DataFrame, x: str, y: str, cell: str, *, is_open: bool = False) -> None:
    drawn, ordered = look(cell), part.sort_values(x)
    axis.plot(
        ordered[x], ordered[y], color=drawn.color, marker=drawn.marker, linestyle=drawn.linestyle, linewidth=1, markersize=5,
        markerfacecolor="white" if is_open else drawn.color, label="" if is_open else part.model.iloc[0],
    )  # fmt: skip


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)


def size_answer(frame: pd.DataFrame) -> str:
    """How counted cost and measured speed grow from the smallest to the largest size, for FAC_Split."""
    own = frame[frame.cell == "flowhn_fac"] if (frame.cell == "flowhn_fac").any() else frame
    counted = own.drop_duplicates("size").sort_values("parameters")
    low, high = counted.iloc[0], counted.iloc[-1]
    first = (
        f"From {low.size_name} to {high.size_name}, {high.model} grows {high.parameters / low.parameters:,.0f} times in "
        f"parameters and {high.flops_per_token / low.flops_per_token:,.0f} times in training FLOPs per token."
    )
    fast = frame.dropna(subset=["tps"])
    if fast.empty:
        return f"{first} No speed was measured here."
    parts = []
    for (size, device), part in fast.groupby(["size_name", "device"], sort=False):
        best = part.loc[part.tps.idxmax()]
        mfu = f" (MFU {best.mfu:.1f} %)" if pd.notna(best.mfu) else ""
        parts.append(f"{size} on {device}: {best.model} with {best.tps:,.0f} tokens/s{mfu} of {len(part)} models")
    return f"{first} Fastest at {'; '.join(parts)}."


def length_answer(frame: pd.DataFrame) -> str:
    """What each model keeps of its speed at the longest T, and who is fastest there."""
    device = frame.device.iloc[0]
    own = frame[frame.device == device]
    longest, shortest = own.seq_len.max(), own.seq_len.min()
    last = own[own.seq_len == longest].sort_values("kept", ascending=False)
    first = own.sort_values("seq_len").groupby("cell").spread.first()
    # Of a ratio: both speeds' half ranges.
    kept = ", ".join(
        f"{row.model} keeps {row.kept:.0f} ± {row.kept * (row.spread + first[row.cell]) / 100:.0f} %"
        for row in last.itertuples()
    )
    fastest = last.loc[last.tps.idxmax()]
    return (
        f"From T = {shortest:,} to {longest:,} on {device}, {kept} of its tokens/s (±: the spread of both speeds over their "
        f"timed windows). At {longest:,} the fastest is {fastest.model} with {fastest.tps:,.0f} tokens/s.{_rise(own)}"
    )


def _rise(frame: pd.DataFrame) -> str:
    """A sentence on the largest rise of a model's rate with T, which nothing in the models explains; else an empty text."""
    rises = []
    for _, part in frame.sort_values("seq_len").groupby("cell", sort=False):
        for a, b in pairwise(part.itertuples()):
            rise = 100 * (b.tps / a.tps - 1)
            if rise > max(_RISE, a.spread + b.spread):
                rises.append((rise, f"{a.model} by {rise:.0f} % from {a.seq_len:,} to {b.seq_len:,}"))
    if not rises:
        return ""
    return f" Rates that rise with T ({max(rises)[1]}) tell that these cells differ by more than their windows show."
