"""Hydra composition with errors that a user can act on, and the construction of a model from a composed config.

Hydra's own command line ends with exit code 1 and several lines on a misspelt key. Everything here goes through
:func:`compose`, which turns each of those into one :class:`~flowhn.errors.UserError` with the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from flowhn.config_checks import BENCH_CHECKS, CHECKS, check_values
from flowhn.errors import UserError
from flowhn.own_classes import check_own, code_of, is_own, register

if TYPE_CHECKING:
    from flowhn.models import CausalLM

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
# What decides a run's result. Everything else (output folder, logger, display, checkpoint interval) may change freely
# between a run and its continuation, and does not make another record.
IDENTITY_KEYS = (
    "model", "vocab_size", "seq_len", "data", "tokens", "global_batch_tokens", "optimizer", "schedule",
    "seed", "eval", "precision", "clip_grad_norm", "val_rows", "val_points", "compile", "device", "own_code",
)  # fmt: skip


_LONGEST_TEXT = 400  # characters of Hydra's own message
_LONGEST_SHOWN = 200  # characters of a user's text that a message repeats
_MAY_BE_NULL = ("experiment", "launcher", "sweep")


def config_dir() -> Path:
    """The folder of the Hydra configs: inside an installed wheel, or at the top of the checkout."""
    here = Path(__file__).resolve()
    for candidate in (here.parent / "configs", here.parents[2] / "configs"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no configs folder beside {here.parent}; install flowhn again (pip install -e .)")


def parse_tokens(budget: Any, named: Mapping[str, int]) -> int:
    """Token budget of a run: a name of the size's own list (smoke, laptop, paper) or a number such as 60M, 1.5B, 200000.

    Raises:
        UserError: the text is neither, or not positive.
    """
    text = str(budget).strip()
    if text in named:
        return int(named[text])
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kKmMbB]?)", text)
    tokens = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if tokens <= 0:
        raise UserError(f"budget={text} is neither one of {', '.join(named)} nor a number of tokens such as 60M")
    return tokens


def _tokens_resolver(budget: Any, named: Any) -> int:
    return parse_tokens(budget, OmegaConf.to_container(named) if OmegaConf.is_config(named) else named)


def _tasks_resolver(devices: Any) -> int:
    """Tasks of a cluster's job on each of its nodes: as many as the run has devices there.

    Raises:
        UserError: not a number; what is on the cluster's nodes is not known here.
    """
    if isinstance(devices, bool) or not isinstance(devices, int):
        raise UserError(f"trainer.devices={devices} has to be a number for a job of a cluster; set it to a node's GPUs")
    return devices


def register_resolvers() -> None:
    """Register ``${tokens:budget,names}``, ``${tasks:devices}`` and options that are classes of one's own; again is harmless."""
    register()
    OmegaConf.register_new_resolver("tokens", _tokens_resolver, replace=True)
    OmegaConf.register_new_resolver("tasks", _tasks_resolver, replace=True)


def groups() -> dict[str, list[str]]:
    """Config groups and their options, as found on disk."""
    root = config_dir()
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def root_groups(root: str) -> list[str]:
    """The groups that ``configs/<root>.yaml`` chooses from."""
    defaults = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{root}.yaml"))["defaults"]
    return [next(iter(entry)) for entry in defaults if isinstance(entry, Mapping)]


def nearest(word: str, candidates: Iterable[str]) -> str:
    """A phrase that suggests the nearest candidate, or lists them all when none is near."""
    names = sorted(set(candidates))
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"


def compose(root: str = "train", overrides: Iterable[str] = ()) -> DictConfig:
    """Compose ``configs/<root>.yaml`` with Hydra overrides.

    Raises:
        UserError: an unknown key or option (with the nearest valid one), or an override that cannot be read.
    """
    register_resolvers()
    overrides = list(overrides)
    if "data=slimpajama" in overrides and not any(word.startswith(("eval=", "experiment=")) for word in overrides):
        overrides.append("eval=paper")  # whoever has the hub for the paper's text has it for the paper's six tasks
    _check_overrides(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = hydra_compose(root, overrides=overrides, return_hydra_config=True)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        with open_dict(cfg):
            del cfg["hydra"]
            cfg.choices = {key: value for key, value in choices.items() if not key.startswith("hydra/")}
        OmegaConf.resolve(cfg)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, KeyError, ValueError, AttributeError, TypeError,
            RecursionError) as error:  # fmt: skip
        raise _explain(error, root, overrides) from error
    if root == "train" and (own := code_of(OmegaConf.to_container(cfg.model))):
        with open_dict(cfg):
            cfg.own_code = own
    if root in ("train", "bench"):
        check_values(OmegaConf.to_container(cfg), checks=CHECKS if root == "train" else BENCH_CHECKS)
    return cfg


def _check_overrides(overrides: list[str]) -> None:
    known = groups()
    parser = OverridesParser.create()
    for override in overrides:
        shown = shorten(override)
        if "\0" in override:
            raise UserError(f"the override {shown!r} holds a NUL character; leave it out")
        try:
            parser.parse_override(override)
        except (HydraException, RecursionError, ValueError) as error:
            raise UserError(f"the override {shown!r} cannot be read; write key=value, for example seed=1") from error
        key, _, value = override.partition("=")
        group = key.lstrip("+~").split("@")[0]
        if group in known and value == "null" and group not in _MAY_BE_NULL:
            raise UserError(f"{group}=null is not possible; {nearest(group, known[group])}")
        if is_own(group, value):
            check_own(group, value)
        elif group in known and re.fullmatch(r"[\w.\-]+", value) and value != "null" and value not in known[group]:
            raise UserError(f"{group}={value} does not exist; {nearest(value, known[group])}")


def _explain(error: Exception, root: str, overrides: list[str]) -> UserError:
    """One sentence for what Hydra or OmegaConf says in several."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):  # raised inside a resolver
            return cause
        cause = cause.__cause__ or cause.__context__
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "budget" in str(error) and "number of tokens" in str(error):
        return UserError(str(error).split("raised while resolving interpolation: ")[-1].splitlines()[0])
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if f"'{key}'" in str(error) or f"'{key.split('.')[-1]}'" in str(error):
            return _unknown(key, root, overrides)
    return UserError(f"the configuration cannot be composed: {text[:_LONGEST_TEXT]}")


def _unknown(key: str, root: str, overrides: list[str]) -> UserError:
    """A key that is nowhere, or one that the chosen options have not: ``data.packing`` with ``data=random``."""
    valid = _valid_keys(root, overrides)
    if key in groups() and key not in valid:
        return UserError(
            f"{key}= cannot be chosen here: configs/{root}.yaml chooses {', '.join(root_groups(root))} only; leave it out"
        )
    group, dot, _ = key.partition(".")
    if dot and group in groups() and key in _valid_keys(root, []):
        chosen = next((word.partition("=")[2] for word in overrides if word.startswith(f"{group}=")), "this choice")
        own = ", ".join(name for name in valid if name.startswith(f"{group}."))
        return UserError(f"{key} does not exist with {group}={chosen}, which has {own}; leave it out")
    return UserError(f"unknown key {key}; {nearest(key, valid)} (put + before it to add a new key)")


def _valid_keys(root: str, overrides: list[str]) -> list[str]:
    """Keys of a root config under the groups that are chosen, and the groups themselves."""
    known = root_groups(root)
    chosen = [word for word in overrides if word.partition("=")[0] in known]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra_compose(root, overrides=chosen)

    def walk(node: Any, prefix: str) -> list[str]:
        found = []
        for key in node:
            name = f"{prefix}{key}"
            found.append(name)
            child = OmegaConf.to_container(node, resolve=False)[key]
            if isinstance(child, dict):
                found += walk(node._get_node(key), f"{name}.")
        return found

    return walk(cfg, "") + known


def to_dict(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain Python containers."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


# Options that came after runs had been named, with the value that does what was done before: they name no other run.
_LATER = {"shared": 0.0}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides the result of a run; its hash names the run."""
    kept = {key: _as_before(config[key]) for key in IDENTITY_KEYS if key in config}
    return kept | {"deterministic": config["trainer"]["deterministic"]}


def _as_before(tree: Any) -> Any:
    """A tree of plain containers without later options that change nothing."""
    if isinstance(tree, Mapping):
        return {key: _as_before(value) for key, value in tree.items() if key not in _LATER or value != _LATER[key]}
    return [_as_before(value) for value in tree] if isinstance(tree, list) else tree


def check_targets(tree: Any) -> None:
    """Refuse a stored model tree that names anything but the classes of ``flowhn.models``, or that is not resolved.

    Hydra calls whatever ``_target_`` names, so a run's folder from somebody else could otherwise run any code. The names
    are compared as they stand and never resolved: a path such as ``flowhn.models.torch.load`` is not on the list. A stored
    tree is resolved already, and what is checked here has to be what is built: an interpolation would be resolved later, by
    Hydra, and can hold a target of its own (``${oc.create:...}``) or read the environment.

    Raises:
        UserError: another target, or an interpolation.
    """
    import flowhn.models

    exported = {name for name in flowhn.models.__all__ if isinstance(getattr(flowhn.models, name), type)}
    allowed = {f"flowhn.models.{name}" for name in exported}
    for node in _nodes(tree):
        target = node.get("_target_") if isinstance(node, Mapping) else None
        if target is not None and (not isinstance(target, str) or target not in allowed):
            raise UserError(
                f"the run's config names _target_={shorten(target)}, which is not a class of flowhn.models, and loading it could "
                "run any code; load it with trust=True (--trust) only if you know where the run comes from"
            )
    check_resolved(tree)


def check_resolved(tree: Any) -> None:
    """Refuse a stored tree with an interpolation in a key or a value; what training stores has none.

    Raises:
        UserError: there is one.
    """
    for node in _nodes(tree):
        texts = node if isinstance(node, Mapping) else [node]
        found = next((text for text in texts if isinstance(text, str) and "${" in text), None)
        if found is not None:
            raise UserError(
                f"the run's config holds the interpolation {shorten(found)}, which training never stores, and resolving it "
                "could run any code; restore config.json or train the run again"
            )


def _nodes(tree: Any) -> Iterator[Any]:
    """A tree of plain containers, its containers and all that they hold."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, Mapping):
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)


def shorten(value: Any) -> str:
    """A value from a file of somebody else, as a message repeats it."""
    text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def build_model(config: Mapping[str, Any]) -> CausalLM:
    """Build the network of a resolved config's ``model`` tree, on the default device.

    Raises:
        UserError: sizes that do not fit (heads and width, split ratio, ...), an unusable kernel asked for by name.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    tree = config["model"]
    try:
        model = instantiate(tree, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        innermost: BaseException = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            innermost = cause
            cause = cause.__cause__ or cause.__context__
        key = next(
            (line.split(":", 1)[1].strip() for line in str(error).splitlines() if line.startswith("full_key:")), ""
        )
        where = ".".join(part for part in ("model", key) if part)
        reason = (str(innermost).strip().splitlines() or [type(innermost).__name__])[0]
        raise UserError(f"the model cannot be built: {where} has a value that does not fit ({reason})") from error
    if not callable(getattr(model, "num_parameters", None)):
        raise UserError("the model cannot be built: model._target_ has to be flowhn.models.CausalLM or a class like it")
    return model
