"""Count how many evaluation questions share a run of 13 words with the training text, and write it beside a table.

python scripts/overlap.py experiments/table1/135m-files-30M data.path=FOLDER eval.data_dir=FOLDER [more key=value of configs/train.yaml]
"""

from __future__ import annotations

import sys
from pathlib import Path

from flowhn.cli import run_entry


def body(argv: list[str]) -> int:
    from flowhn.config import compose, to_dict
    from flowhn.experiment import Workshop
    from flowhn.overlap_report import write_overlap
    from flowhn.reporting.overlap import overlap_notes

    folder, *words = argv
    words = [
        word for word in ("data=files", "eval=paper") if not any(w.startswith(word.split("=")[0] + "=") for w in words)
    ] + words
    write_overlap(to_dict(compose("train", words)), Workshop(), Path(folder))
    sys.stdout.write("\n".join(overlap_notes(Path(folder))) + "\n")
    return 0


if __name__ == "__main__":
    run_entry(body)
