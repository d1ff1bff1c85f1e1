"""``flowhn-eval``: zero-shot evaluation of a finished run with lm-eval.

    flowhn-eval RUN [eval=paper] [eval.data_dir=FOLDER] [eval.limit=100] [--val-loss]

RUN is a run's folder (``outputs/runs/...``), or what ``flowhn-export`` made of one. Results are printed and written to
``RUN/eval-<suite>.json``. ``--val-loss`` also computes the loss on the validation rows with which the run's training ended.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowhn.cli import run_entry
from flowhn.errors import UserError


def main() -> None:
    """Entry point of ``flowhn-eval``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flowhn-eval", description="Evaluate a finished run with lm-eval.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run, for example outputs/runs/llama-tiny-...")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example eval=paper eval.data_dir=DIR")
    parser.add_argument("--val-loss", action="store_true", help="also the loss on the run's own validation rows")
    parser.add_argument("--trust", action="store_true", help="build classes from outside flowhn that the run names")
    args = parser.parse_intermixed_args(list(argv))  # key=value may stand behind an option

    from flowhn.config import compose, to_dict
    from flowhn.evaluation.suites import needs_heldout
    from flowhn.experiment import Workshop
    from flowhn.loading import load_run
    from flowhn.run_folder import write_json
    from flowhn.run_long_context import described
    from flowhn.run_validation import validate
    from flowhn.training import resolve_hardware

    asked = to_dict(compose("train", args.overrides))
    if not asked["eval"]["tasks"]:
        raise UserError(
            f"eval={asked['choices']['eval']} has no tasks, so there is nothing to evaluate; choose eval=docs"
        )
    hardware = resolve_hardware(asked)
    loaded = load_run(args.run, device=hardware.device, trust=args.trust)
    config = {**loaded.config, "cache_dir": asked["cache_dir"]}
    workshop = Workshop()
    # The questions of eval=docs come from the run's own held-out documents.
    needs_documents = needs_heldout(asked["eval"]["tasks"])
    result = workshop.evaluate(
        loaded.model,
        loaded.tokenizer,
        config,
        suite=asked["eval"],
        hardware=hardware,
        heldout_file=workshop.prepare(config).heldout_file if needs_documents else None,
    )
    if args.val_loss:
        result["validation"] = validate(loaded, workshop=workshop, config=config, hardware=hardware)
    path = args.run / f"eval-{result['suite']}.json"
    write_json(path, described(loaded.config, None) | result)
    for task, numbers in result["tasks"].items():
        shown = "  ".join(
            f"{key} {value:.4f}" for key, value in numbers.items() if isinstance(value, float) and key != "chance"
        )
        sys.stdout.write(f"{task:<22}{shown}\n")
    if args.val_loss:
        sys.stdout.write(f"{'validation loss':<22}{result['validation']['loss']:.4f} nats per token\n")
    sys.stdout.write(f"written: {path}\n")
    return 0


if __name__ == "__main__":
    main()
