#!/usr/bin/env python3
"""The one trained model that is kept: experiments/small_model, of a run on this machine.

    python scripts/keep_model.py outputs/runs/NAME      exports the run, with its record, a check and a README
    python scripts/keep_model.py --readme               writes README.md again, from what lies there

The run is that of ``COMMAND``. The folder is what ``flowhn-export`` writes (its tokenizer.json without white space), below 3 MB.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from flowhn.cli import run_entry
from flowhn.config import compose
from flowhn.errors import UserError
from flowhn.export import export_run
from flowhn.loading import load_run
from flowhn.models.generation import Sampling, generate_tokens
from flowhn.reporting.record import read_record
from flowhn.runs import plan

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "small_model"
WORDS = ["model=flowhn", "split=fac", "size=tiny", "data=docs", "budget=laptop"]
COMMAND = f"flowhn-train {' '.join(WORDS)}\npython scripts/keep_model.py outputs/runs/NAME\n"
LARGEST = 3_000_000  # bytes
PROMPT, NEW_TOKENS = "The function returns", 24
# data=docs differs by Python version; this text does not.
TEXT = """Return a list of the names of all files in the given directory. The names are in arbitrary order, and special
entries are left out even when they are present. If the optional argument is not given, the current working directory is
used. The argument may be a string, a bytes object or an object that represents a path of the file system. When the
directory cannot be read, an exception of the same type is raised as for a file that does not exist. The iterator keeps an
open handle until it is exhausted or closed, so that it should be used as a context manager. Changed in version 3.2: the
method accepts keyword arguments, and the default value of the encoding depends on the platform."""


def text_loss(net: torch.nn.Module, tokenizer: object) -> float:
    """Next-token loss of ``TEXT``, cut to one row of training (128 tokens and one target), in nats per token."""
    ids = torch.tensor([tokenizer.encode(TEXT)[:129]])
    with torch.no_grad():
        logits = net(ids[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits[0].double(), ids[0, 1:]))


def continuation(net: torch.nn.Module, tokenizer: object) -> str:
    """What the model says after ``PROMPT``, taking the likeliest token."""
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    tokens = generate_tokens(net, ids, max_new_tokens=NEW_TOKENS, sampling=Sampling(0.0, None, None), window=128)
    return tokenizer.decode([int(token) for token in tokens])


def readme(folder: Path) -> str:
    """README.md of the kept model, from its record and check."""
    record = read_record(folder / "record.json")
    check = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    tasks = record.evaluation["tasks"]
    continued, last = tasks["docs_continuation"], tasks["docs_lastword"]
    said = "\n".join(f"    {line}".rstrip() for line in (check["prompt"] + check["continuation"]).rstrip().split("\n"))
    return f"""# The one model that is kept

FlowHN FAC_Split, size tiny ({record.parameters:,} parameters, float32), trained by the commands in `command.txt` on {record.tokens:,} tokens
of Python's own documentation on {record.device["name"]} in {record.wall_seconds["total"]:.0f} s (commit `{record.git["commit"][:7]}`, seed {record.seed}; `record.json`). It is
here so that you can try the commands without training; it has learnt words and line breaks, no sentences. Load it with either

```bash
flowhn-generate experiments/small_model --prompt "{check["prompt"]}" --max-new-tokens {check["max_new_tokens"]}
python -c "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('experiments/small_model', trust_remote_code=True))"
```

The first says

{said}

`flowhn-eval experiments/small_model --val-loss` gives the record's numbers again, under Python {record.versions["python"]} (another version has other
documentation): validation loss {record.losses["final_val"]:.4f} nats per token, {100 * continued["acc_mutual_info"]:.1f} % of {continued["n"]} continuations (guessing:
{100 * continued["chance"]:.0f} %), {100 * last["acc"]:.1f} % of {last["n"]} last words. `check.json` has the loss of a fixed text, {check["loss"]:.4f}, for any version.
Weights are safetensors only; the two Python files import flowhn.
"""


def keep(run: Path, folder: Path) -> None:
    """Write the folder of the kept model from the folder of its run.

    Raises:
        UserError: it is another run than that of ``COMMAND``, its code was changed, or the folder is too large.
    """
    record = read_record(run / "record.json")
    wanted = plan(compose("train", WORDS)).run_id
    if record.run_id != wanted:
        raise UserError(f"{run} is run {record.run_id} and not {wanted}, that of: flowhn-train {' '.join(WORDS)}")
    if record.git["dirty"] or not record.git["commit"]:
        raise UserError(f"{run} was trained with code that is in no commit; commit it and train again with --force")
    shutil.rmtree(folder, ignore_errors=True)
    export_run(run, folder)
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    compact = json.dumps(backend, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
    shutil.copyfile(run / "record.json", folder / "record.json")
    (folder / "command.txt").write_text(COMMAND, encoding="utf-8")
    loaded = load_run(folder)
    check = {
        "text": TEXT,
        "loss": text_loss(loaded.model, loaded.tokenizer),
        "prompt": PROMPT,
        "max_new_tokens": NEW_TOKENS,
        "continuation": continuation(loaded.model, loaded.tokenizer),
    }
    (folder / "check.json").write_text(json.dumps(check, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(folder), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size >= LARGEST:
        raise UserError(f"{folder} has {size:,} bytes, and {LARGEST:,} are allowed; keep a smaller model")


def main(argv: list[str]) -> int:
    """Keep a run, or write the README again."""
    if argv == ["--readme"]:
        (FOLDER / "README.md").write_text(readme(FOLDER), encoding="utf-8")
    elif len(argv) == 1:
        keep(Path(argv[0]), FOLDER)
    else:
        raise UserError("give the folder of a run, or --readme")
    return 0


if __name__ == "__main__":
    run_entry(main)
