"""Put the committed Table 1 into README.md, between its markers. ``--check`` only tells whether it is up to date (exit 1 if not).

python scripts/update_readme.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from flowhn.reporting.record import find_records
from flowhn.reporting.tables import table1

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "experiments" / "table1" / "tiny-docs-laptop"
BEGIN = "<!-- table1 begins: written by scripts/update_readme.py from experiments/table1/tiny-docs-laptop -->"
END = "<!-- table1 ends -->"


def block() -> str:
    """The README's table, from the committed records."""
    records = find_records(SOURCE / "records")
    frame = table1(records, size="tiny")
    task = frame.attrs["tasks"][0]
    lines = [
        "| model | parameters | validation loss | tokens/s | MFU % | continuation accuracy % | paper, 135M: tokens/s | paper, 135M: average of six % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.to_dict("records"):
        mfu = "" if pd.isna(row["mfu"]) else f"{row['mfu']:.1f}"
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.2f}M | {row['val_loss']:.3f} | {row['tps']:,.0f} | {mfu} | "
            f"{row[task]:.1f} ± {row[f'{task}_stderr']:.1f} | {row['paper_tps']:,.0f} | {row['paper_average']:.2f} |"
        )
    first = records[0]
    minutes = sum(record.wall_seconds["total"] for record in records) / 60
    lines += [
        "",
        f"Made by `./reproduce.sh` on {first.device['name']} with {first.device['count']} threads: {len(records)} models of size tiny, "
        f"{first.tokens:,} tokens each, {minutes:.1f} minutes in all, commit `{(first.git['commit'] or 'unknown')[:7]}`. Unigram entropy of the text: "
        f"{first.losses['unigram_entropy']:.2f} nats; guessing a continuation: 25 %. **Our columns and the paper's are not comparable** (size, text, "
        "tokens, device): they stand side by side so that you can compare the order of rows. "
        "Full table, figures, verdicts and records: [experiments/table1/tiny-docs-laptop](experiments/table1/tiny-docs-laptop/table.md).",
        "",
        "![validation loss over tokens, all models](experiments/table1/tiny-docs-laptop/loss.png)",
    ]
    return "\n".join(lines)


def main() -> int:
    """Write or check the README."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    new = f"{head}{BEGIN}\n{block()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
