"""Renaming of parameters: from the names of a :class:`~flowhn.models.lm.CausalLM` to another implementation's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from flowhn.errors import UserError


def foreign_names(
    own: Iterable[str], *, outer: Mapping[str, str], layers: str, layer: Callable[[int], Mapping[str, str]]
) -> dict[str, str]:
    """``{our parameter: its foreign name}`` for every name of ``own``.

    Args:
        own: names of our state dict.
        outer: our module outside the layers -> the foreign one (``{"norm": "model.norm"}``).
        layers: the foreign prefix of the list of layers (``model.layers``).
        layer: index of a layer -> table from our modules inside it to the foreign ones.
    """
    names = {}
    for name in own:
        if name.startswith("layers."):
            _, index, inside = name.split(".", 2)
            names[name] = f"{layers}.{index}.{_renamed(inside, layer(int(index)))}"
        else:
            names[name] = _renamed(name, outer)
    return names


def _renamed(name: str, table: Mapping[str, str]) -> str:
    module = next(module for module in table if name.startswith(f"{module}."))
    return table[module] + name[len(module) :]


def matched_weights(
    own: Mapping[str, Tensor], foreign: Mapping[str, Tensor], names: Mapping[str, str], *, source: str
) -> dict[str, Tensor]:
    """The foreign weights under our names; nothing may be missing, left over, or of another shape.

    Args:
        own: our state dict, for the shapes.
        foreign: the other implementation's state dict.
        names: from :func:`foreign_names`.
        source: what ``foreign`` is, for the message.

    Raises:
        UserError: the first name that is missing, unknown or of another shape.
    """
    missing = sorted(set(names.values()) - set(foreign))
    unknown = sorted(set(foreign) - set(names.values()))
    if missing or unknown:
        parts = [f"it lacks {missing[0]} ({len(missing)} missing)"] if missing else []
        parts += [f"it has {unknown[0]}, which is not part of it ({len(unknown)} unknown)"] if unknown else []
        raise UserError(f"{source} does not fit the model that its config describes: {' and '.join(parts)}")
    for name, other in names.items():
        if foreign[other].shape != own[name].shape:
            raise UserError(
                f"{source} does not fit the model that its config describes: {other} has the shape "
                f"{tuple(foreign[other].shape)}, expected {tuple(own[name].shape)}"
            )
    return {name: foreign[other] for name, other in names.items()}
