"""A split or a fusion of one's own from any folder: ``split=my_module.MySplit``, ``fusion=my_module.MyFusion``.

Hydra finds a group's option as a file. This adds a source of options (``own://`` in ``configs/train.yaml``) that answers for
names with a dot: the option is the class. The folder that the command runs in counts as well as ``PYTHONPATH``. A run's id
covers the text of such a module, because a finished run is never repeated.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from flowhn.errors import UserError

# Group -> what an option of one's own is besides its class, and the base class it must have.
GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "split": ({}, "flowhn.models.splits.Split"),
    "fusion": ({"_partial_": True}, "flowhn.models.fusions.Fusion"),
}


class OwnClassSource(ConfigSource):
    """Options ``<group>/<module>.<Class>`` of the groups in :data:`GROUPS`."""

    @staticmethod
    def scheme() -> str:
        return "own"

    def load_config(self, config_path: str) -> ConfigResult:
        group, _, target = config_path.partition("/")
        node = OmegaConf.create({"_target_": target, **GROUPS[group][0]})
        return ConfigResult(config=node, path=self.full_path(), provider=self.provider, header={"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.rstrip("/") in GROUPS

    def is_config(self, config_path: str) -> bool:
        group, _, target = config_path.partition("/")
        return group in GROUPS and "." in target

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


def register() -> None:
    """Make ``own://`` known to Hydra; calling it again is harmless."""
    Plugins.instance().register(OwnClassSource)


def is_own(group: str, value: str) -> bool:
    """Whether an override chooses a class of one's own."""
    return group in GROUPS and "." in value


def look_here() -> str:
    """Let modules in the folder of the command be imported, behind everything else: none hides an installed package."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    return here


def check_own(group: str, target: str) -> None:
    """Import the class that ``group=target`` names.

    Raises:
        UserError: there is no such module or class, the module cannot be imported, or the class has another base.
    """
    base = _locate(GROUPS[group][1])
    module, _, name = target.rpartition(".")
    here = look_here()
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{group}={target}: {module} needs {error.name}, which is not installed") from error
        raise UserError(
            f"{group}={target}: there is no module {module} in {here} or on PYTHONPATH; run the command in its folder"
        ) from error
    except Exception as error:
        raise UserError(f"{group}={target}: {module} cannot be imported ({type(error).__name__}: {error})") from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise UserError(f"{group}={target} must name a subclass of {GROUPS[group][1]} in {module}")


def code_of(tree: Any) -> dict[str, str]:
    """Module -> first 12 hex digits of the SHA-256 of its file, for all targets outside flowhn in a model's tree."""
    found: dict[str, str] = {}
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            target = node.get("_target_")
            if isinstance(target, str) and not target.startswith("flowhn."):
                module = target.rpartition(".")[0]
                path = getattr(sys.modules.get(module), "__file__", None)
                if path is not None:
                    found[module] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)
    return found


def _locate(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
