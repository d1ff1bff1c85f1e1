"""The README's table of our lm-eval adapter beside lm-eval's own ``HFLM``, from its record."""

from __future__ import annotations

import json
from pathlib import Path


def adapter_lines(path: Path) -> list[str]:
    """lm-eval's own ``HFLM`` beside ours: differences in float32 and float64, and seconds."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "",
        "The adapter beside lm-eval's own `HFLM` on the same random weights, padded and batched: largest difference in a "
        f"log-likelihood, in nats, of {found['requests']} real requests of the six sets.",
        "",
        "| model | float32 | float32, `HFLM`'s sums in float64 | float64 | ours: float32 - float64 | `HFLM`: float32 - float64 |",
        "|---|---|---|---|---|---|",
    ]
    for model in found["models"].values():
        narrow = model["float32"]
        distance = narrow["largest_distance_from_float64"]
        numbers = (
            narrow["largest_difference"],
            narrow["largest_difference_with_hflm_sums_in_float64"],
            model["float64"]["largest_difference"],
            distance["ours"],
            distance["hflm"],
        )
        lines.append(f"| {model['model']} | {' | '.join(f'{value:.1e}' for value in numbers)} |")
    largest = max(model["largest_log_likelihood"] for model in found["models"].values())
    rolling = {
        name: max(model[name]["rolling_largest_relative_difference"] for model in found["models"].values())
        for name in ("float32", "float64")
    }
    return [
        *lines,
        "",
        f"The limits are {found['limits']['float32']:.0e} in float32 and {found['limits']['float64']:.0e} in float64. What "
        "differs in float32 is rounding: `HFLM` adds up a continuation in float32 (log-likelihoods of up to "
        f"{largest:,.0f} nats), ours in float64. Rolling log-likelihoods agree to {rolling['float32']:.1e} of their size in "
        f"float32, {rolling['float64']:.1e} in float64. Best of three on {found['threads']} CPU thread(s), Llama: "
        f"{min(found['seconds_ours']):.1f} s, `HFLM` {min(found['seconds_hflm']):.1f} s at its best batch size "
        f"({found['hflm_batch_size']}). How: [experiments/hflm](experiments/hflm/README.md).",
    ]
