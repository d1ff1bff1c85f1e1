"""``flowhn-export``: a finished run as a Hugging Face folder.

    flowhn-export RUN OUT_DIR

OUT_DIR holds model.safetensors, config.json, generation_config.json, the tokenizer and two small files that import
flowhn, so that ``AutoModelForCausalLM.from_pretrained(OUT_DIR, trust_remote_code=True)`` loads it wherever transformers and
flowhn are installed. ``flowhn-generate`` and ``flowhn-eval`` take OUT_DIR too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.cli import run_entry
from flowhn.errors import UserError

if TYPE_CHECKING:
    from flowhn.hf import FlowHNForCausalLM
    from flowhn.loading import LoadedRun

# What flowhn-generate and flowhn-eval read of a run's config; the network itself is config.json's ``net``.
_RUN_KEYS = ("vocab_size", "seq_len", "data", "eval", "choices", "cell", "seed", "tokens", "val_rows")
# transformers copies these files and looks for the class in them; all code stays in the installed package.
_REMOTE_FILES = {
    "configuration_flowhn.py": ("FlowHNConfig", "configuration"),
    "modeling_flowhn.py": ("FlowHNForCausalLM", "modeling"),
}
_AUTO_MAP = {
    "AutoConfig": "configuration_flowhn.FlowHNConfig",
    "AutoModelForCausalLM": "modeling_flowhn.FlowHNForCausalLM",
}


def main() -> None:
    """Entry point of ``flowhn-export``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flowhn-export", description="Write a finished run as a Hugging Face folder.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run (outputs/runs/...)")
    parser.add_argument("out_dir", type=Path, help="folder to write, made if it is not there")
    args = parser.parse_args(list(argv))
    export_run(args.run, args.out_dir)
    sys.stdout.write(f"written: {args.out_dir}\n")
    return 0


def export_run(run: Path, out: Path) -> None:
    """Write the run's model and tokenizer to the folder ``out``.

    Raises:
        UserError: the run cannot be loaded, its model is built of classes from outside flowhn, or ``out`` holds something.
    """
    from safetensors import SafetensorError

    from flowhn.loading import load_run

    out = out.absolute()  # "." has no name of its own
    is_there = out.exists()
    if is_there and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT_DIR={out} is there already; give a new or an empty folder")
    loaded = load_run(run)
    model = _hugging_face_model(loaded)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # a stopped export leaves no folder that looks whole
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _no_code_copied():
            model.save_pretrained(partial)
        for name, (class_name, module) in _REMOTE_FILES.items():
            text = f'from flowhn.hf.{module} import {class_name}\n\n__all__ = ["{class_name}"]\n'
            (partial / name).write_text(text, encoding="utf-8")
        _write_tokenizer(loaded, partial)
        if is_there:  # kept: it may be somebody's working folder
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(out / path.name)  # without config.json, the last one, it does not look whole
            partial.rmdir()
        else:
            partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"OUT_DIR={out} cannot be written ({error}); free some space or give another folder") from error


@contextmanager
def _no_code_copied() -> Iterator[None]:
    """Once ``from_pretrained`` has loaded an export in this process, transformers would copy the package's files as well."""
    from flowhn.hf import FlowHNConfig, FlowHNForCausalLM

    classes = (FlowHNConfig, FlowHNForCausalLM)
    before = [kind._auto_class for kind in classes]
    try:
        for kind in classes:
            kind._auto_class = None
        yield
    finally:
        for kind, value in zip(classes, before, strict=True):
            kind._auto_class = value


def _hugging_face_model(loaded: LoadedRun) -> FlowHNForCausalLM:
    """The run's network, with its weights, as a transformers model."""
    import torch
    from transformers import GenerationConfig

    from flowhn.hf import FlowHNConfig, FlowHNForCausalLM

    eos = None if loaded.tokenizer is None else loaded.tokenizer.eos_id
    config = FlowHNConfig(
        net=loaded.config["model"],
        run={key: loaded.config[key] for key in _RUN_KEYS if key in loaded.config},
        max_position_embeddings=int(loaded.config["seq_len"]),
        vocab_size=loaded.model.vocab_size,
        hidden_size=loaded.model.d_model,
        num_hidden_layers=len(loaded.model.layers),
        architectures=["FlowHNForCausalLM"],
        auto_map=_AUTO_MAP,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=None if loaded.tokenizer is None else loaded.tokenizer.pad_id,
        dtype=torch.float32,
    )
    model = FlowHNForCausalLM(config)
    model.net.load_state_dict(loaded.model.state_dict())
    model.generation_config = GenerationConfig(
        eos_token_id=eos, pad_token_id=config.pad_token_id, do_sample=False, use_cache=True
    )
    return model.eval()


def _write_tokenizer(loaded: LoadedRun, out: Path) -> None:
    """Tokenizer files for AutoTokenizer; like ours, it takes text that spells a special token as text."""
    if loaded.tokenizer is None:
        return
    from flowhn.data.prepared import TOKENIZER_NAMES

    source = next(loaded.folder / name for name in TOKENIZER_NAMES if (loaded.folder / name).exists())
    folder = source if source.is_dir() else source.parent
    shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    backend = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["id"]: token["content"] for token in backend.get("added_tokens", [])}
    eos, pad = loaded.tokenizer.eos_id, loaded.tokenizer.pad_id
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(loaded.config["seq_len"]),
        "eos_token": names.get(eos),
        "pad_token": names.get(pad, names.get(eos)),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "right",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
