"""A network from its tree of plain containers, without Hydra (what Hydra's ``instantiate`` makes of the same tree)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flowhn.models
from flowhn.errors import UserError

_PREFIX = "flowhn.models."


def build_net(tree: Mapping[str, Any]) -> flowhn.models.CausalLM:
    """The network that ``tree`` describes.

    Raises:
        UserError: a target that is not one of ``flowhn.models``' classes (nothing else is ever called), or a tree that
            describes something else than a language model.
    """
    net = _built(tree)
    if not isinstance(net, flowhn.models.CausalLM):
        raise UserError("config.json's net is not a flowhn.models.CausalLM; export the run again with flowhn-export")
    return net


def _built(node: Any) -> Any:
    if isinstance(node, list | tuple):
        return [_built(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    given = {key: _built(value) for key, value in node.items() if key not in ("_target_", "_partial_", "_convert_")}
    if "_target_" not in node:
        return given
    build = _class(node["_target_"])
    try:
        return partial(build, **given) if node.get("_partial_") else build(**given)
    except TypeError as error:
        raise UserError(f"config.json does not fit this version of flowhn ({error}); export the run again") from error


def _class(target: Any) -> type:
    name = target.removeprefix(_PREFIX) if isinstance(target, str) and target.startswith(_PREFIX) else ""
    found = getattr(flowhn.models, name, None) if name in flowhn.models.__all__ else None
    if not isinstance(found, type):
        raise UserError(f"config.json names _target_={target}, which is not a class of flowhn.models; it is not built")
    return found
