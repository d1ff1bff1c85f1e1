"""The artefacts of ``configs/artefacts``: their YAML, and which runs or timings a command asks for.

An artefact is a table of trained models (``cells``) or of timed ones (``bench``). ``budgets`` says what ``budget=smoke``,
``laptop`` (the default) and ``gpu`` mean for it: overrides, and seeds where they differ. The user's words win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowhn.config import compose, config_dir, nearest, parse_tokens
from flowhn.errors import UserError
from flowhn.runs import Run, plan

DEFAULT_BUDGET = "laptop"
GPU_BUDGET = "gpu"
_GPU_OVERRIDES = ["size=135m", "data=slimpajama", "budget=30M"]  # of an artefact that does not say what budget=gpu is
_DEFAULT_SIZE = "tiny"  # as in configs/train.yaml


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One YAML of ``configs/artefacts``.

    Attributes:
        title, claim: what it is, and what the paper says about it; ``question`` makes it an ablation.
        cells: rows by name, each a list of overrides of ``configs/train.yaml``; a row whose numbers fit one size has such a
            list for each size (see :func:`cells_at`).
        overrides: for every cell, before its own and the user's.
        figures, tables: names for :func:`flowhn.reporting.artefact.write_artefact` (not for ablations).
        budgets: by name ``overrides``, and optionally ``seeds``.
        measure: ``branches`` or ``long_context`` measures the trained models (:mod:`flowhn.run_branches`,
            :mod:`flowhn.run_long_context`) instead of tabulating their records.
        suite: of ``long_context``: by size, overrides of ``configs/eval/long_context.yaml``.
        bench: for timed artefacts, with ``cells`` empty: ``case`` (of ``configs/bench``), ``counts`` (sizes to count). Their
            budget is ``gpu`` on a machine that has one, unless another is asked for.
        lr: by size, the learning rate of each model for runs of at most ``max_tokens`` tokens, or a list of such for runs of
            several lengths; ``flowhn_no`` is FlowHN with ``split=no`` alone (``flowhn_<split>`` wins over ``flowhn``).
        seeds: by size, the seeds of cells that are trained more than once.
        like: the artefact whose ``lr`` and ``seeds`` hold here, beside its own seeds; ``lr_like`` takes its ``lr`` alone. Runs
            that are the same there and here are then trained once.
        gap: ``of`` a cell ``to`` others in validation loss: the table says how much of it each row closes.
    """

    name: str
    title: str
    claim: str
    question: str | None = None
    overrides: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=lambda: ["verdicts"])
    cells: dict[str, list[str] | dict[str, list[str]]] = field(default_factory=dict)
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    measure: str | None = None
    suite: dict[str, list[str]] = field(default_factory=dict)
    bench: dict[str, Any] | None = None
    lr: dict[str, dict[str, float] | list[dict[str, float]]] = field(default_factory=dict)
    seeds: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    like: str | None = None
    lr_like: str | None = None
    gap: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """What a command asks for: the runs wanted, the artefact's other runs, and the budget's name for the folder."""

    wanted: dict[str, Run]
    others: dict[str, Run]
    budget: str


def artefact_files() -> dict[str, Path]:
    """The YAML of each artefact by name."""
    return {path.stem: path for path in sorted((config_dir() / "artefacts").glob("*.yaml"))}


def load_artefact(name: str) -> Artefact:
    """Read an artefact.

    Raises:
        UserError: there is none of this name.
    """
    known = artefact_files()
    if name not in known:
        raise UserError(f"there is no artefact {name}; {nearest(name, known)}")
    artefact = Artefact(name=name, **OmegaConf.to_container(OmegaConf.load(known[name])))
    if artefact.like is not None:
        other = load_artefact(artefact.like)
        sizes = {*other.seeds, *artefact.seeds}
        seeds = {size: {**other.seeds.get(size, {}), **artefact.seeds.get(size, {})} for size in sizes}
        artefact = replace(artefact, lr=other.lr, seeds=seeds)
    elif artefact.lr_like is not None:
        artefact = replace(artefact, lr=load_artefact(artefact.lr_like).lr)
    return artefact


def preset(artefact: Artefact, overrides: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """The budget's name, what the artefact says about it, and the user's overrides without the budget's name.

    A budget that is no name of the artefact (a number of tokens) replaces the laptop's tokens alone.

    Raises:
        UserError: a budget that is neither.
    """
    default = GPU_BUDGET if artefact.bench is not None and _sees_gpu() else DEFAULT_BUDGET
    asked = next((word.partition("=")[2] for word in overrides if word.startswith("budget=")), default)
    rest = [word for word in overrides if not word.startswith("budget=")]
    if not artefact.budgets:
        return (asked, {"overrides": _GPU_OVERRIDES}, rest) if asked == GPU_BUDGET else ("", {}, list(overrides))
    if asked in artefact.budgets:
        return asked, artefact.budgets[asked], rest
    if artefact.bench is not None:
        raise UserError(f"budget={asked} is not one of {', '.join(artefact.budgets)}, which {artefact.name} can take")
    parse_tokens(asked, dict.fromkeys(artefact.budgets, 1))
    return asked, artefact.budgets[DEFAULT_BUDGET], list(overrides)


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def plan_cells(artefact: Artefact, overrides: Sequence[str]) -> Plan:
    """The runs asked for, and the artefact's other cells (their records, where they exist, stay in the table).

    Raises:
        UserError: a cell, seed or key that cannot be.
    """
    models, overrides = _selection(overrides, ("models", "model"))
    seeds, overrides = _selection(overrides, ("seeds",))
    budget, given, overrides = preset(artefact, overrides)
    common = [*artefact.overrides, *given.get("overrides", ()), *overrides]
    for cell in models or ():
        if cell not in artefact.cells:
            raise UserError(f"models={cell} is not a cell of {artefact.name}; {nearest(cell, artefact.cells)}")
    if models is not None and not models:
        raise UserError(f"models=[] selects nothing; choose from {', '.join(artefact.cells)}")
    cells = cells_at(artefact, _size(common), models)
    if seeds is not None and not (seeds and all(seed.isdigit() for seed in seeds)):
        raise UserError(f"seeds={','.join(seeds)} must be whole numbers, for example seeds=[0,1,2]")
    _refuse_what_cells_set(artefact.name, cells, overrides)
    if seeds is None and not any(word.startswith("seed=") for word in overrides):
        seeds = given.get("seeds")
    wanted: dict[str, Run] = {}
    others: dict[str, Run] = {}
    own_seeds = {} if any(word.startswith("seed=") for word in common) else artefact.seeds.get(_size(common), {})
    for cell in cells:
        for seed in seeds or own_seeds.get(cell) or [None]:
            own = [*artefact.overrides, *given.get("overrides", ()), *cells[cell], *overrides]
            own += [f"cell={cell}", f"artefact={artefact.name}"] + ([] if seed is None else [f"seed={seed}"])
            label = cell if seed is None else f"{cell} seed {seed}"
            into = wanted if models is None or cell in models else others
            into[label] = _plan_tuned(artefact, last_wins(own))
    return Plan(wanted, others, budget or next(iter(wanted.values())).config["budget"])


def cells_at(artefact: Artefact, size: str, chosen: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The overrides of each cell at a size; a cell that has none there is left out unless it is asked for.

    Args:
        chosen: the cells asked for; None asks for all.

    Raises:
        UserError: a cell that is asked for has numbers for other sizes only.
    """
    cells: dict[str, list[str]] = {}
    for cell, words in artefact.cells.items():
        if not isinstance(words, Mapping):
            cells[cell] = words
        elif size in words:
            cells[cell] = words[size]
        elif chosen is None or cell in chosen:
            raise UserError(
                f"size={size}: the cell {cell} of {artefact.name} has numbers for {', '.join(words)} only; choose one of these "
                "sizes, or other cells with models=[...]"
            )
    return cells


def _size(overrides: Sequence[str]) -> str:
    """The size that the overrides choose."""
    return next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("size=")), _DEFAULT_SIZE)


def rates_for(artefact: Artefact, size: str, tokens: int) -> dict[str, float]:
    """The artefact's learning rates for runs of a size and budget, by model; empty where the size's own hold."""
    told = artefact.lr.get(size, [])
    for rates in sorted([told] if isinstance(told, dict) else told, key=lambda rates: rates["max_tokens"]):
        if tokens <= rates["max_tokens"]:
            return {model: rate for model, rate in rates.items() if model != "max_tokens"}
    return {}


def _plan_tuned(artefact: Artefact, overrides: list[str]) -> Run:
    """The run, with the artefact's learning rate for its model, size and budget where the user gives none."""
    run = plan(compose("train", overrides))
    choices = run.config["choices"]
    rates = rates_for(artefact, choices["size"], run.config["tokens"])
    rate = rates.get(f"{choices['model']}_{choices['split']}", rates.get(choices["model"]))
    if rate is None or any(word.startswith("lr=") for word in overrides):
        return run
    return plan(compose("train", [*overrides, f"lr={rate}"]))


def _selection(overrides: Sequence[str], keys: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """Take ``models=[a,b]`` (or ``model=a``) out of the overrides; returns the chosen names and the rest."""
    chosen, rest = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in keys:
            chosen = [item.strip() for item in value.strip("[]").split(",") if item.strip()]
        else:
            rest.append(override)
    return chosen, rest


def _refuse_what_cells_set(name: str, cells: Mapping[str, list[str]], overrides: Sequence[str]) -> None:
    """A key in which the cells differ is not the user's: the rows would keep their names and all be the same model."""
    own = {override.partition("=")[0]: cell for cell, words in cells.items() for override in words}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in own or key in ("cell", "artefact"):
            raise UserError(
                f"{override} would make the rows of {name} the same model under other names; select rows with models=[...], or "
                f"train one model with flowhn-train {override}"
            )


def last_wins(overrides: Sequence[str]) -> list[str]:
    """Hydra refuses a group given twice; here the user's word replaces the artefact's."""
    return list({override.partition("=")[0]: override for override in overrides}.values())
