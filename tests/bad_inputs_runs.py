"""Broken runs: weights, configs, tokenizers, checkpoints and records of a run's folder."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_inputs import Bad, Stage, kind, train_argv


class _Owned:
    def __reduce__(self):
        return exec, ("open('owned', 'w').close()",)


def damage(path: Path, rng: random.Random, how: str) -> None:
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "bit flip":
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
    elif how == "foreign":
        path.write_bytes(rng.choice((b"", b"\0" * 100, b"{}", b"plain text", rng.randbytes(500), b"\xff" * 64)))
    elif how == "pickled code":
        path.write_bytes(pickle.dumps({"state_dict": _Owned()}))
    elif how == "torch file with code":
        torch.save({"state_dict": _Owned()}, path)
    elif how == "torch file":
        torch.save({"x": torch.zeros(3)}, path)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "missing":
        path.unlink()


def _use(run: Path, place: Path, stage: Stage, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    return rng.choice((
        ("generate", (str(run), "--prompt", "some words", "--max-new-tokens", "2")),
        ("eval", (str(run), "eval=docs", "eval.limit=2", f"cache_dir={stage.cache}")),
        ("export", (str(run), str(place / "exported"))),
    ))  # fmt: skip


def _copied(stage: Stage, place: Path) -> Path:
    return Path(shutil.copytree(stage.text_run, place / "run"))


@kind("weights of a run", 9)
def weights(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = _copied(stage, place)
    path = run / "model.safetensors"
    how = rng.choice(("cut", "cut", "foreign", "pickled code", "torch file with code", "torch file", "folder", "missing", "shape",
                      "name more", "name less", "integers", "nan", "inf", "header"))  # fmt: skip
    damage(path, rng, how)
    if how in ("shape", "name more", "name less", "integers", "nan", "inf"):
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name).clone()
        changed = {
            "shape": tensor.flatten()[:-1].clone(),
            "name more": tensor,
            "integers": tensor.to(torch.int64),
            "nan": tensor * torch.nan,
            "inf": tensor + torch.inf,
        }
        if how in changed:
            tensors[name] = changed[how]
        if how == "name more":
            tensors["extra.weight"] = torch.zeros(2)
        save_file(tensors, path)
    if rng.random() < 0.5:  # a run without the hash of its weights: the other checks have to see it
        content = json.loads((run / "config.json").read_text(encoding="utf-8"))
        del content["weights_sha256"]
        (run / "config.json").write_text(json.dumps(content), encoding="utf-8")
    elif how == "header":
        data = path.read_bytes()
        path.write_bytes((2 ** rng.randrange(20, 63)).to_bytes(8, "little") + data[8:])
    command, argv = _use(run, place, stage, rng)
    return Bad("weights of a run", f"{how} at {command}", command, argv, ("model.safetensors",))


@kind("config of a run", 9)
def config(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = _copied(stage, place)
    path = run / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    how = rng.choice(("cut", "foreign", "folder", "missing", "no model", "wrong sizes", "target", "list", "no config", "null",
                      "tokenizer hash", "vocabulary", "removed key", "deep"))  # fmt: skip
    damage(path, rng, how)
    tree = content["config"]["model"]
    junk = rng.choice((None, 5, "text", [], {}, -1, 1e999))
    if how == "no model":
        content["config"]["model"] = junk
    elif how == "wrong sizes":
        tree[rng.choice(sorted(set(tree) - {"_target_", "_convert_"}))] = junk
    elif how == "target":
        tree[rng.choice(("_target_", "extra"))] = {"_target_": "os.system", "_args_": ["touch owned"]}
    elif how in ("list", "null"):
        content = [content] if how == "list" else None
    elif how == "no config":
        content["config"] = junk
    elif how == "tokenizer hash":
        content["tokenizer_sha256"] = "0" * 64
    elif how == "vocabulary":
        tree["vocab_size"] = rng.choice((299, 10**12, 0, -1, "x"))
    elif how == "removed key":
        del content["config"][rng.choice(("model", "data", "choices", "seq_len", "vocab_size", "eval"))]
    if how == "deep":
        path.write_text("[" * 100_000, encoding="utf-8")
    elif how not in ("cut", "foreign", "folder", "missing"):
        path.write_text(json.dumps(content), encoding="utf-8")
    command, argv = _use(run, place, stage, rng)
    must = how not in ("removed key", "wrong sizes")
    return Bad("config of a run", f"{how} at {command}", command, argv, ("config", "model", "run", "weights"), must)


@kind("interpolation in a run's config", 1)
def interpolation(stage: Stage, place: Path, rng: random.Random) -> Bad:
    """Hydra would resolve it when it builds the model, after the targets were checked."""
    run = _copied(stage, place)
    path, evil = run / "config.json", run / "evil.pt"
    torch.save(_Owned(), evil)
    content = json.loads(path.read_text(encoding="utf-8"))
    code = f"${{oc.create:{{_target_:torch.load,f:'{evil}',weights_only:false}}}}"
    text = rng.choice((code, f"\\\\{code}", "${oc.env:HOME}", "${.vocab_size}", "${nonsense", "${oc.decode:5}"))
    where = rng.choice(("value", "key", "list", "block"))
    tree = content["config"]["model"]
    if where == "value":
        tree[rng.choice(sorted(set(tree) - {"_target_", "_convert_"}))] = text
    elif where == "block":
        tree["blocks"] = text
    else:
        tree["extra"] = {text: 1} if where == "key" else [[text]]
    path.write_text(json.dumps(content), encoding="utf-8")
    command, argv = _use(run, place, stage, rng)
    return Bad(
        "interpolation in a run's config", f"{where}: {text} at {command}", command, argv, ("interpolation",), True
    )


@kind("tokenizer of a run", 4)
def run_tokenizer(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = _copied(stage, place)
    how = rng.choice(("cut", "foreign", "missing", "folder", "bit flip"))
    damage(run / "tokenizer.json", rng, how)
    command, argv = _use(run, place, stage, rng)
    return Bad(
        "tokenizer of a run",
        f"{how} at {command}",
        command,
        argv,
        ("tokenizer",),
        how != "missing" or command != "export",
    )


@kind("checkpoints", 8)
def checkpoints(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = place / "out" / "runs" / stage.stopped_run.name
    shutil.copytree(stage.stopped_run, run)
    files = sorted((run / "checkpoints").glob("step-*"))
    hit = rng.sample(files, rng.randrange(1, len(files) + 1))
    how = rng.choice(
        (
            "cut",
            "bit flip",
            "foreign",
            "pickled code",
            "torch file with code",
            "torch file",
            "missing",
            "folder",
            "resigned",
        )
    )
    for path in hit:
        damage(path, rng, how)
        if how == "resigned" and path.suffix == ".ckpt":
            _resign(path, rng)
    argv = train_argv(stage, place, "trainer.checkpoint.every_n_steps=2")
    return Bad(
        "checkpoints", f"{how}: {', '.join(path.name for path in hit)}", "train", argv, ("checkpoint", "step-"), False
    )


def _resign(path: Path, rng: random.Random) -> None:
    """Put something else under the name, with a manifest whose hash fits."""
    import hashlib

    torch.save(rng.choice(({}, {"state_dict": {}}, {"flowhn": 5}, [1], {"state_dict": {"x": torch.zeros(1)}})), path)
    manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    manifest |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(manifest), encoding="utf-8")


def _edit(content: dict, rng: random.Random) -> None:
    key = rng.choice(sorted(content))
    content[key] = rng.choice((None, -1, "edited", [], {}, 1e300, [["a", "b"]]))


@kind("records", 9)
def records(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = place / "out" / "runs" / stage.random_run.name
    shutil.copytree(stage.random_run, run)
    path = run / "record.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    how = rng.choice(("cut", "foreign", "edited", "edited inside", "digit", "nan", "newer", "no hash", "list", "deep"))
    if how == "edited":
        _edit(content, rng)
    elif how == "edited inside":
        _edit(content[rng.choice([key for key, value in content.items() if isinstance(value, dict) and value])], rng)
    elif how == "digit":
        content["losses"]["final_val"] = round(content["losses"]["final_val"] - 1, 3)
    elif how == "newer":
        content["schema_version"] = 99
    elif how == "no hash":
        del content["sha256"]
    text = json.dumps([content] if how == "list" else content)
    if how == "nan":
        text = text.replace('"final_val": ', '"final_val": NaN, "x": ')
    elif how == "deep":
        text = "[" * 100_000
    path.write_text(text, encoding="utf-8")
    if how in ("cut", "foreign"):
        damage(path, rng, how)
    return Bad("records", how, "train", train_argv(stage, place), ("record.json",))


@kind("records in a table", 4)
def table_records(stage: Stage, place: Path, rng: random.Random) -> Bad:
    """The broken record of one cell: the table must not be drawn from it."""
    from flowhn.artefacts import load_artefact, plan_cells

    own = [word for word in BASE_OF_TABLE if "=" in word]
    words = [*own, f"output_dir={place / 'out'}", f"cache_dir={stage.cache}", "models=[llama]"]
    run = plan_cells(load_artefact("table1"), words).wanted["llama"]
    run.folder.mkdir(parents=True)
    shutil.copyfile(stage.random_run / "record.json", run.record_path)  # it belongs to another run
    how = rng.choice(("another run's", "cut", "foreign"))
    damage(run.record_path, rng, how)
    return Bad("records in a table", how, "reproduce", ("table1", *words), ("record.json",))


BASE_OF_TABLE = ("size=tiny", "budget=smoke", "data=random", "eval=none", "trainer=cpu")


@kind("folders with missing files", 3)
def missing(stage: Stage, place: Path, rng: random.Random) -> Bad:
    run = _copied(stage, place)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "record.json")
    gone = rng.sample(files, rng.randrange(1, len(files)))
    for path in gone:
        path.unlink()
    names = [path.name for path in gone]
    command, argv = _use(run, place, stage, rng)
    needed = {"config.json", "model.safetensors"} | ({"tokenizer.json"} if command != "export" else set())
    must = bool(needed & set(names))
    return Bad("folders with missing files", f"{', '.join(names)} at {command}", command, argv, ("run",), must)


@kind("prepared data", 4)
def prepared(stage: Stage, place: Path, rng: random.Random) -> Bad:
    cache = place / "cache"
    shutil.copytree(stage.cache, cache)
    files = [
        path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock") and path.stat().st_size
    ]
    path = rng.choice(sorted(files))
    how = rng.choice(("cut", "foreign", "missing"))
    damage(path, rng, how)
    words = rng.choice(((), ("data=files", f"data.path={stage.root / 'good.txt'}", "data.val_fraction=0.2")))
    argv = train_argv(stage, place, *words, cache=cache)
    return Bad("prepared data", f"{how}: {path.relative_to(cache)}", "train", argv, ("cache", "data."), False)
