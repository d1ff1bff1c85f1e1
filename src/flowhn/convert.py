"""``flowhn-convert``: weights of the paper's published code as a folder that flowhn loads; a checkpoint as one file.

    flowhn-convert published WEIGHTS.safetensors|.pth|.ckpt --config CONFIG.json --out DIR
    flowhn-convert checkpoint outputs/runs/NAME/checkpoints/step-00000120.ckpt --out FILE.safetensors

CONFIG.json holds the keys of :class:`flowhn.models.convert.published.PublishedConfig`. DIR is then loaded like a finished
run: ``flowhn.load(DIR)``. A ``.pth`` (``.pt``, ``.bin``, ``.ckpt``) is read with ``weights_only=True``; nothing in it is
ever executed. A checkpoint is a file, or the folder that sharded training (trainer=fsdp) on any number of devices wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.cli import run_entry
from flowhn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from flowhn.models.convert.published import PublishedConfig

_TRAINED_LENGTH = 1024  # tokens a row, in the published training scripts (paper.md)
# Keys under which a checkpoint often holds its weights (module: DeepSpeed's), and how many may lie in one another.
_WRAPPERS = ("model_state_dict", "state_dict", "model", "module", "net")
_DEEPEST = 8
# Put into names by torch.compile, DistributedDataParallel, FSDP and activation checkpointing, at any depth.
_WRAPPED = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def main() -> None:
    """Entry point of ``flowhn-convert``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flowhn-convert", description="Turn weights of another implementation into ours.", allow_abbrev=False
    )
    kinds = parser.add_subparsers(dest="source", required=True, metavar="published|checkpoint")
    published = kinds.add_parser(
        "published",
        help="the paper's published code (Parallel-Hybrid-Model), modes A to D",
        description="Turn a state dict of the paper's published code into a folder for flowhn.load.",
        allow_abbrev=False,
    )
    published.add_argument("weights", type=Path, help="its state dict: a .safetensors, .pth or .ckpt file")
    published.add_argument("--config", type=Path, required=True, help="its config: a JSON object with mode and sizes")
    published.add_argument("--out", type=Path, required=True, help="folder to write, made if it is not there")
    checkpoint = kinds.add_parser(
        "checkpoint",
        help="a checkpoint of a run, also a sharded one",
        description="Write the weights of a checkpoint, sharded or not, as one safetensors file.",
        allow_abbrev=False,
    )
    checkpoint.add_argument("path", type=Path, help="outputs/runs/NAME/checkpoints/step-....ckpt")
    checkpoint.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    args = parser.parse_args(list(argv))
    if args.source == "checkpoint":
        convert_checkpoint(args.path, args.out)
    else:
        convert_published(args.weights, args.config, args.out)
    sys.stdout.write(f"written: {args.out}\n")
    return 0


def convert_checkpoint(path: Path, out: Path) -> None:
    """Write the network's weights in a checkpoint as one safetensors file, by the names of ``model.safetensors`` of a run.

    Args:
        path: a file, or the folder of a sharded checkpoint; its hashes are checked.
        out: the file; its folder is made if it is not there.

    Raises:
        UserError: no such checkpoint, a damaged one, or a disk that cannot be written.
    """
    from flowhn.run_folder import save_tensors
    from flowhn.training.checkpoints import read_weights

    prefix = "net."  # the network is the LightningModule's attribute of that name
    weights = {name.removeprefix(prefix): tensor for name, tensor in read_weights(path).items()}
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out={out} has to be a file that ends with .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(weights, out)


def convert_published(weights: Path, config: Path, out: Path) -> None:
    """Write the folder ``out`` (``config.json``, ``model.safetensors``) from the published code's weights and config.

    Raises:
        UserError: a file that is missing, damaged or not what it should be; weights that do not fit the config; ``out``
            holds something already.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from flowhn.models.convert.published import PublishedConfig
    from flowhn.run_folder import CONFIG_NAME, WEIGHTS_NAME, file_sha256, write_json

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} is there already; give a new or an empty folder")
    published = PublishedConfig.read(_read_json(config))
    run_config = _run_config(published, weights)
    own = _matched(read_state_dict(weights), published, run_config, weights)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{WEIGHTS_NAME}.tmp"
    try:
        save_file(own, temporary, metadata={"format": "pt"})
        os.replace(temporary, out / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--out={out} cannot be written ({error}); free some space or give another folder") from error
    about = {"run_id": None, "name": out.name, "config": run_config}
    write_json(out / CONFIG_NAME, about | {"weights_sha256": file_sha256(out / WEIGHTS_NAME)})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config={path} cannot be read ({error.strerror}); give the published config as JSON"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config={path} is not JSON ({error}); give the published config as JSON") from error


def _run_config(published: PublishedConfig, weights: Path) -> dict[str, Any]:
    """A resolved run configuration whose ``model`` tree is the published network."""
    from dataclasses import asdict

    from flowhn.config import compose, to_dict
    from flowhn.models.convert.published import SPLIT_OF_MODE

    config = to_dict(
        compose(
            "train",
            [
                "model=flowhn", "ssm=mamba1", "fusion=concat_proj", *SPLIT_OF_MODE[published.mode],
                "size=135m", "data=slimpajama", "eval=none",
                f"vocab_size={published.vocab_size}", f"seq_len={_TRAINED_LENGTH}",
                f"size.d_model={published.hidden_size}",
                f"size.n_heads={published.num_attention_heads}", f"size.n_kv_heads={published.num_key_value_heads}",
                f"size.n_layers.flowhn={published.num_hidden_layers}", f"size.d_ff.flowhn={published.intermediate_size}",
            ],
        )
    )  # fmt: skip
    eps = {"norm_eps": float(published.rms_norm_eps)}
    block = config["model"]["blocks"]["parallel"]
    config["model"] |= eps
    block |= eps
    block["ssm"] |= eps | {
        "d_state": published.mamba_d_state,
        "d_conv": published.mamba_d_conv,
        "expand": published.mamba_expand,
        "dt_rank": published.mamba_dt_rank,
        "bcdt_rms_norm": True,
    }
    config["choices"]["size"] = "published"
    config["converted"] = {"from": weights.name, "published_config": asdict(published)}
    return config


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth`` (``.pt``, ``.bin``, ``.ckpt``) file by name, without wrappers' prefixes
    and without rotary embeddings' ``inv_freq``, which older versions of transformers save and nobody trains.

    Raises:
        UserError: no such file, another kind of file, a damaged one, a pickled module, something else than tensors, weights
            that are NaN or infinite in float32.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the published code's state dict (.safetensors or .pth)")
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        content = _read_pickle(path)
    else:
        raise UserError(
            f"{path} is neither .safetensors nor .pth (.pt, .bin, .ckpt); give the published code's state dict as one of these"
        )
    return _tensors(content, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from error


def _read_pickle(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # about other pickle protocols; what fails raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        text, again = str(error), "torch.save(model.state_dict(), 'weights.pth')"
        if any(sign in text for sign in ("GLOBAL", "unsupported class", "Can only", "TorchScript")):
            raise UserError(
                f"{path} holds a pickled module or other Python objects, which could run any code and is not read; where it "
                f"was made, save the state dict alone: {again}"
            ) from error
        raise UserError(
            f"{path} is not a whole file of torch.save; copy it again, or save it again: {again}"
        ) from error


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for _ in range(_DEEPEST):  # a pickle may hold itself
        inner = [content[k] for k in _WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)]
        content = inner[0] if inner else content
    fits = isinstance(content, Mapping) and content
    if not fits or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        raise UserError(
            f"{path} holds no state dict (names and tensors); save it with torch.save(model.state_dict(), 'weights.pth')"
        )
    tensors = _unwrapped({k: v for k, v in content.items() if not f".{k}".endswith(".inv_freq")})
    odd = [name for name, t in tensors.items() if not t.is_floating_point() or t.layout != torch.strided]
    if odd:
        raise UserError(f"{path} holds {odd[0]} as {tensors[odd[0]].dtype}; save plain floating-point weights")
    hollow = [name for name, t in tensors.items() if t.is_meta]
    if hollow:
        raise UserError(f"{path} holds no values for {hollow[0]} (device meta); save the weights after they are loaded")
    bad = [name for name, t in tensors.items() if not torch.isfinite(t.to(torch.float32)).all()]
    if bad:
        raise UserError(
            f"{path} holds NaN or infinite values in {bad[0]} ({len(bad)} of {len(tensors)} tensors, read as float32); give a "
            "checkpoint from before training went wrong"
        )
    return tensors


def _unwrapped(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put into the names, and without the one prefix of all (``model.`` of a Lightning module)."""
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPED) for name in content}
    if len(set(names.values())) < len(names):
        return dict(content)  # two names became one: nothing was a wrapper
    prefixes = {name.removesuffix("lm_head.weight") for name in names.values() if name.endswith("lm_head.weight")}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    if not all(name.startswith(prefix) for name in names.values()):
        prefix = ""
    return {short.removeprefix(prefix): content[name] for name, short in names.items()}


def _matched(
    weights: Mapping[str, Tensor], published: PublishedConfig, run_config: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """The published weights under our names, in float32."""
    import torch

    from flowhn.config import build_model
    from flowhn.models.convert.names import matched_weights
    from flowhn.models.convert.published import check_embedding, count_layers, published_names

    if count_layers(weights) != published.num_hidden_layers:
        raise UserError(
            f"{path} has {count_layers(weights)} layers of the published code (model.layers.*), and its config says "
            f"num_hidden_layers={published.num_hidden_layers}; give the config that belongs to these weights"
        )
    # Depth, width and vocabulary agree from here on: building the model cannot overflow.
    check_embedding(weights, published, source=str(path))
    with torch.device("meta"):  # names and shapes only
        own = build_model(run_config).state_dict()
    matched = matched_weights(own, weights, published_names(own), source=str(path))
    return {name: tensor.to(torch.float32, copy=True).contiguous() for name, tensor in matched.items()}


if __name__ == "__main__":
    main()
