"""What a long run may take, and how its figures are shown; scripts/long_run.py fails by these, scripts/reliability.py shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MIB = 2**20
PREPARATION_BYTES = 2 * 2**30  # peak memory of the preparation with all of its processes
SLOPE_BYTES = MIB  # per 1,000 steps or batches
GROWTH_BYTES = 20 * MIB  # the highest sample over the first one after the warm-up
JUDGED = 5000  # steps or batches; shorter runs are still warming up, and a slope of theirs says nothing
METRICS_BYTES = 10**6
TERMINAL_BYTES = 3 * 10**5
# Title and the figure's place, of each of the two preparations.
PREPARATION_ROWS = {
    "peak memory": "peak_rss_bytes",
    "of it not mapped files": "peak_rss_without_mapped_files_bytes",
    "peak disk": "peak_disk_bytes",
    "disk after": "cache_bytes",
    "seconds": "seconds",
    "tokens": "tokens",
    "tokens per second": "tokens_per_second",
    "documents": "documents",
    "SHA-256 of the rows": "sha256",
}
Check = tuple[str, Any, str, bool]  # what, measured, limit, whether it holds


def checks(result: Mapping[str, Any]) -> Iterator[Check]:
    """Every figure with a limit of the parts that were measured."""
    if part := result.get("data_preparation"):
        yield from _preparation(part)
    for name, unit, count in (("training", "steps", "steps"), ("evaluation", "batches", "batches")):
        if part := result.get(name):
            yield from _memory(name, part, unit, part[count])
    if part := result.get("logs"):
        yield from _logs(part)


def failures(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each limit that does not hold."""
    return [
        f"{what}: {number(measured)}, the limit is {limit}"
        for what, measured, limit, holds in checks(result)
        if not holds
    ]


def _preparation(part: Mapping[str, Any]) -> Iterator[Check]:
    for name, words in (("killed", "killed and gone on with"), ("never_killed", "never stopped")):
        if made := part.get(name):
            peak = made["peak_rss_bytes"]
            yield (
                f"peak memory of the preparation, {words}",
                size(peak),
                f"below {size(PREPARATION_BYTES)}",
                peak < PREPARATION_BYTES,
            )
    if part.get("same_rows") is not None:
        yield "the same rows with kills and without", part["same_rows"], "yes", part["same_rows"] is True
    kills = part["killed"]["kills"]
    done = sum(kill["killed"] for kill in kills)
    yield f"kills that hit, of {len(kills)} tried", done, "at least 1", done >= 1
    kept = [kill["token_shards_kept"] for kill in kills if kill["killed"] and kill["while"] != "reading"]
    if kept:
        yield "fewest tokenised shards that a kill after reading left", min(kept), "at least 1", min(kept) >= 1


def _memory(name: str, part: Mapping[str, Any], unit: str, count: int) -> Iterator[Check]:
    growth = part["highest_bytes"] - part["first_bytes"]
    yield (
        f"{name}: growth of memory after the warm-up",
        size(growth),
        f"below {size(GROWTH_BYTES)}",
        growth < GROWTH_BYTES,
    )
    if count >= JUDGED:
        slope = part["slope_bytes"]
        yield (
            f"{name}: slope of memory per 1,000 {unit}, over {count:,}",
            size(slope),
            f"below {size(SLOPE_BYTES)}",
            slope < SLOPE_BYTES,
        )


def _logs(part: Mapping[str, Any]) -> Iterator[Check]:
    for what, key, limit in (
        ("metrics.csv", "metrics_csv_bytes", METRICS_BYTES),
        ("output on the terminal, written to a file", "terminal_output_bytes", TERMINAL_BYTES),
    ):
        yield f"{what} after {part['steps']:,} steps", size(part[key]), f"at most {size(limit)}", part[key] <= limit
    for what, written, announced in (
        ("run: most disk while running", "written_at_most_bytes", "dry_run_disk_while_running_bytes"),
        ("run: disk after", "run_folder_bytes", "dry_run_disk_after_bytes"),
        ("prepared data", "data_cache_bytes", "dry_run_data_cache_bytes"),
    ):
        told = part.get(announced)
        limit = "to be announced by --dry-run" if told is None else f"at most the {size(told)} that --dry-run announced"
        yield what, size(part[written]), limit, told is not None and part[written] <= told


def size(n: float) -> str:
    """Bytes for a reader."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= factor:
            return f"{n / factor:.2f} {unit}"
    return f"{n:.0f} B"


def number(value: Any) -> str:
    """A figure of the page."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not measured"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def preparation_table(part: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: both preparations side by side."""
    names = [name for name in ("killed", "never_killed") if part.get(name)]
    titles = {"killed": "killed and gone on with", "never_killed": "never stopped"}
    rows = []
    for title, key in PREPARATION_ROWS.items():
        values = [part[name].get(key) for name in names]
        if key == "sha256":
            shown = [str(value)[:16] for value in values]
        else:
            shown = [size(value) if key.endswith("_bytes") else number(value) for value in values]
        rows.append([title, *shown])
    return ["preparation", *(titles[name] for name in names)], rows


def kill_rows(part: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each kill of the preparation hit and left."""
    head = ["killed while", "hit", "shards left whole", "shards torn", "the next call began with"]
    keys = ("while", "killed", "token_shards_kept", "token_shards_torn", "next_began_with")
    return head, [[number(kill.get(key)) for key in keys] for kill in part["killed"]["kills"]]
