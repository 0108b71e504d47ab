"""Names of leaves, and pytrees as JSON that holds these names."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from typing import TypeAlias

import jax

from .._types import PyTree, path_str
from .leaves import Json, is_quantity

__all__ = ["Structure", "built", "entry_name", "names_in", "segment_name", "structure_of"]

Structure: TypeAlias = str | Json  # the name of a leaf, or a kind of container with its children

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def segment_name(key: Hashable) -> str:
    text = ".".join(map(segment_name, key)) if isinstance(key, tuple) else path_str((key,))
    return _ADDRESS.sub("", text)


def entry_name(entry: object) -> str:
    """One step into a pytree."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return segment_name(getattr(entry, attribute))
    return str(entry)


def structure_of(tree: PyTree, names: Iterator[str]) -> Structure:
    """A pytree as JSON: names of leaves in tagged containers."""
    if tree is None:
        return {"none": None}
    below = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree or is_quantity(x))[0]
    if below and not below[0][0]:
        return next(names)
    children = [structure_of(child, names) for _, child in below]
    if type(tree) in (list, tuple):
        return {type(tree).__name__: children}
    plain = type(tree) is dict and all(isinstance(key, (str, int)) for key in tree)
    keys = [path[0].key if plain else entry_name(path[0]) for path, _ in below]
    return {"dict": [list(pair) for pair in zip(keys, children)]}


def built(structure: Structure, leaves: Mapping[str, PyTree]) -> PyTree:
    if isinstance(structure, str):
        return leaves[structure]
    ((kind, children),) = structure.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {key: built(child, leaves) for key, child in children}
    return {"list": list, "tuple": tuple}[kind](built(child, leaves) for child in children)


def names_in(structure: Structure) -> Iterator[str]:
    if isinstance(structure, str):
        yield structure
    else:
        ((kind, children),) = structure.items()
        for child in children or ():
            yield from names_in(child[1] if kind == "dict" else child)
