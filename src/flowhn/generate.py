"""``flowhn-generate``: continue a text with a trained run, each token read once.

    flowhn-generate RUN --prompt TEXT [--max-new-tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed S] [--window W]
    flowhn-generate --cost [RUN] [--size 135m] [--window W]

Attention keeps its keys and values, Mamba its state, so that no token is read twice. A split that is proportional to the
length (``split.window=null``) would route a token differently as the text grows: its routing is frozen at ``--window``,
the training length by default, and repeats from there on. ``--no-cache`` reads the whole text again for every token,
routed as in training. ``--cost`` prints what a decoded token costs in each of the ten models instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.cli import run_entry
from flowhn.errors import UserError

if TYPE_CHECKING:
    from flowhn.loading import LoadedRun
    from flowhn.models import CausalLM

_CELLS = (
    "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac",
)  # fmt: skip
_BROKEN = "\ufffd"  # what a decoder gives for the first bytes of a character


def main() -> None:
    """Entry point of ``flowhn-generate``."""
    run_entry(_main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowhn-generate", description="Continue a text with a trained run.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a finished run (outputs/runs/...)")
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default 100")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens that reach probability P together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, help="length at which a split's routing is frozen; the training length")
    parser.add_argument("--no-cache", action="store_true", help="read the whole text again for every token")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--trust", action="store_true", help="build classes from outside flowhn that the run names")
    parser.add_argument(
        "--cost", action="store_true", help="print FLOPs and cache bytes of a decoded token, ten models"
    )
    parser.add_argument("--size", help="with --cost: the models' size; that of RUN")
    return parser


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(list(argv))
    if args.window is not None and args.window < 1:
        raise UserError(f"--window={args.window} must be a positive number of tokens")
    if args.cost:
        if args.run is None and args.size is None:
            raise UserError("--cost needs a run or a size, for example --size 135m")
        sys.stdout.write(cost_table(args.run, size=args.size, window=args.window, trust=args.trust))
        return 0
    if args.run is None or args.prompt is None:
        raise UserError("give a run and --prompt, for example flowhn-generate outputs/runs/NAME --prompt 'The model'")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={args.max_new_tokens} must be at least 1")
    if args.no_cache and args.window is not None:
        raise UserError("--no-cache routes as in training, so --window has no effect; leave one of the two out")
    for piece in generated_text(args):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def generated_text(args: argparse.Namespace) -> Iterator[str]:
    """The prompt and its continuation, piece by piece as characters are complete."""
    import torch

    from flowhn.loading import load_run
    from flowhn.models.generation import Sampling, generate_tokens

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    device = _device(args.device)
    run = load_run(args.run, device=device, trust=args.trust)
    if run.tokenizer is None:
        raise UserError(
            f"{args.run} has no tokenizer (trained on random tokens, or converted weights); put its tokenizer.json there, or "
            "choose a run of a text corpus"
        )
    window = None if args.no_cache else routing_window(run, args.window)
    ids = run.tokenizer.encode(args.prompt) or [run.tokenizer.eos_id]
    tokens = generate_tokens(
        run.model,
        torch.tensor([ids], device=device),
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
        window=window,
        use_cache=not args.no_cache,
    )
    yield args.prompt
    yield from _characters(run.tokenizer, (int(token) for token in tokens))


def routing_window(run: LoadedRun, asked: int | None) -> int | None:
    """The length at which splits are frozen for decoding; says so on stderr where the run leaves it open."""
    trained = int(run.config["seq_len"])
    if not run.model.length_dependent:
        if asked is not None:
            raise UserError(
                "--window is for runs whose split.window is null, and this one's routing is fixed; leave it out"
            )
        return None
    window = trained if asked is None else asked
    sys.stderr.write(
        f"split.window=null: a token's branch would depend on the final length; frozen at {window} tokens"
        f"{' (the training length)' if window == trained else f' (training length: {trained})'}, then repeated; "
        "--no-cache routes as in training\n"
    )
    return window


def _characters(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Text of tokens until the one that ends a text; bytes of an unfinished character wait for the rest."""
    made: list[int] = []
    shown = ""
    for token in tokens:
        if token == tokenizer.eos_id:
            break
        made.append(token)
        text = tokenizer.decode(made)
        if not text.endswith(_BROKEN):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(made)[len(shown) :]


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name; a build without CUDA asserts
        raise UserError(f"--device={name} cannot be used here; choose cpu, or cuda on a machine that has it") from error
    return device


def cost_table(run: Path | None, *, size: str | None, window: int | None, trust: bool = False) -> str:
    """A Markdown table: FLOPs and cache bytes of a decoded token, means over one window of ``window`` tokens.

    Args:
        run: a run to add as a row of its own.
        size: of the ten models; None: the run's.
        window: tokens of the window; None: the training length.
    """
    from flowhn.config import compose, to_dict
    from flowhn.loading import load_run

    rows: list[tuple[str, CausalLM, int]] = []
    if run is not None:
        loaded = load_run(run, trust=trust)
        size = size or loaded.config["choices"]["size"]
        window = window or int(loaded.config["seq_len"])
        rows.append((loaded.folder.name, loaded.model, window))
    window = window or int(to_dict(compose("train", [f"size={size}"]))["seq_len"])
    rows += [(cell, model, window) for cell, model in _ten_models(size)]
    lines = [
        f"One token decoded with a cache, mean over tokens 1 to {window} of a text (routing window {window}), size {size}.",
        "Growth of the cache: over the window behind that one, where nothing but keys and values grows.",
        "",
        "| model | MFLOPs a token | of which not LM head | cache growth, bytes a token | cache after the window, bytes |",
        "|---|---|---|---|---|",
        *(_cost_row(*row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _ten_models(size: str | None) -> Iterator[tuple[str, CausalLM]]:
    import torch

    from flowhn.config import build_model, compose, to_dict

    for cell in _CELLS:
        model, _, split = cell.partition("_")
        config = to_dict(compose("train", [f"model={model}", f"split={split or 'fac'}", f"size={size}"]))
        with torch.device("meta"):
            yield cell, build_model(config)


def _cost_row(name: str, model: CausalLM, window: int) -> str:
    from flowhn.models.generation import decode_cost

    # The first token brings the states of constant size; growth is counted from the second window on.
    cost = decode_cost(model, 0, n_tokens=window, window=window)
    growth = decode_cost(model, window, n_tokens=window, window=window).added_bytes
    head = 2 * model.d_model * model.vocab_size
    return (
        f"| {name} | {cost.flops / 1e6:.3f} | {(cost.flops - head) / 1e6:.3f} | {growth:,.0f} | {cost.held_bytes:,} |"
    )


if __name__ == "__main__":
    main()
