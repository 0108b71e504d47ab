"""A run as a dictionary of named arrays, and what has to fit when it is put back."""

from __future__ import annotations

import json
from collections.abc import Mapping

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np

from .._engines.pieces import cut_like, is_pieces
from .._jax import placed
from .._types import PyTree
from .leaves import SCALARS, Array, Json, decoded, encoded, is_quantity, is_whole, with_unit
from .names import built, names_in, structure_of
from .run import MODULATOR, Learner, identity_of, learner_of, named_leaves, parts_of

__all__ = ["DESCRIPTION", "description_of", "load_state_dict", "restored", "state_dict"]

FORMAT, VERSION = "braintrace checkpoint", 1


DESCRIPTION = "description"  # among arrays, the bytes of a JSON text; in a file, a text of its own


_SHOWN = 20


def state_dict(learner: Learner, optimizer: object = None, **more: PyTree) -> dict[str, Array]:
    """What :func:`save` writes, as arrays by name, for other libraries to keep.

    Parameters
    ----------
    learner, optimizer, **more
        As for :func:`save`.

    Returns
    -------
    dict
        Path with slashes -> array: JAX arrays as they are (sharded ones too) without units, the data of JAX keys, and
        NumPy arrays for numbers and strings (their bytes); where there are several processes, also for what is no array
        of all of them. ``'description'`` holds the bytes of a JSON text with the
        rest.

    Raises
    ------
    TypeError, ValueError
        As :func:`save`.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> learner = braintrace.compile(braintrace.nn.ValinaRNNCell(2, 3), 'd_rtrl', jnp.zeros(2))
    >>> arrays = braintrace.state_dict(learner, step=7)
    >>> arrays['model/W/weight/weight'].shape, arrays['more/step']
    ((5, 3), array(7))
    >>> braintrace.load_state_dict(learner, arrays)
    {'step': 7}
    """
    arrays, records, structures = {}, {}, {}
    for part, leaves in named_leaves(parts_of(learner, optimizer, more)):
        for name, leaf in leaves.items():
            arrays[name], records[name] = encoded(name, leaf)
        if part.key is not None:
            structures[part.key] = structure_of(part.value, iter(leaves))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "learner": identity_of(learner_of(learner)),
        "arrays": records,
        "more": structures,
    }
    if jax.process_count() > 1:  # what lies in this process alone is the same in all; orbax takes it as a NumPy array
        arrays = {
            k: v if getattr(v, "is_fully_addressable", True) is False else np.asarray(v) for k, v in arrays.items()
        }
    text = json.dumps(description, ensure_ascii=False)
    return {DESCRIPTION: np.frombuffer(text.encode(), np.uint8), **arrays}


def load_state_dict(
    learner: Learner, arrays: Mapping[str, Array], optimizer: object = None, **more: PyTree
) -> dict[str, PyTree]:
    """Give a learner the values of :func:`state_dict`, with the checks of :func:`load`.

    Parameters
    ----------
    learner, optimizer, **more
        As for :func:`load`.
    arrays : mapping
        As :func:`state_dict` gives it; entries are JAX or NumPy arrays.

    Returns
    -------
    dict
        As :func:`load`.

    Raises
    ------
    TypeError, ValueError
        As :func:`load`.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp
    >>> make = lambda n: braintrace.compile(braintrace.nn.ValinaRNNCell(2, n), 'd_rtrl', jnp.zeros(2))
    >>> arrays = braintrace.state_dict(make(3))
    >>> braintrace.load_state_dict(make(3), arrays)
    {}
    >>> braintrace.load_state_dict(make(4), arrays)
    Traceback (most recent call last):
        ...
    ValueError: The dictionary does not fit what it is loaded into, and nothing was loaded:
      ...
      model/h: the shape (3,) was saved, here it is (4,)
      ...
    """
    source = "The dictionary"
    if not isinstance(arrays, Mapping) or DESCRIPTION not in arrays:
        raise ValueError(
            f"{source} has no entry {DESCRIPTION!r}, so it is not known what the arrays are. Pass all that "
            "braintrace.state_dict has given."
        )
    rest = dict(arrays)
    description = description_of(np.asarray(rest.pop(DESCRIPTION)).tobytes(), source)
    return restored(source, description, rest, learner, optimizer, more)


def description_of(text: bytes, source: str) -> Json:
    try:
        description = json.loads(text)
        known = description["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{source} is no checkpoint. Pass what braintrace.save or braintrace.state_dict has made.")
    if description["version"] > VERSION:
        raise ValueError(
            f"{source} has format {description['version']}, and this version of braintrace reads formats up to "
            f"{VERSION}. Install the version that it was written with, or a newer one."
        )
    return description


def restored(
    source: str,
    description: Json,
    arrays: Mapping[str, Array],
    learner: Learner,
    optimizer: object,
    more: Mapping[str, PyTree],
) -> dict[str, PyTree]:
    one = learner_of(learner)
    records = description["arrays"]
    named = named_leaves(parts_of(learner, optimizer, more))
    if MODULATOR in records:  # it takes any value, as by assignment
        named = [(part, leaves) for part, leaves in named if part.name != MODULATOR]
    structures = {key: s for key, s in description["more"].items() if key not in more}
    free = {MODULATOR, *(name for s in structures.values() for name in names_in(s))}
    wanted = {name: leaf for _, leaves in named for name, leaf in leaves.items()}
    problems = _other_learner(description["learner"], identity_of(one))
    for name in sorted(wanted.keys() | records.keys()):
        if name not in records:
            problems.append(f"{name}: is here, and was not saved")
        elif name not in wanted and name not in free:
            problems.append(f"{name}: was saved, and is not here")
        elif name not in arrays or list(jnp.shape(arrays[name])) != _stored_shape(records[name], arrays[name]):
            problems.append(f"{name}: is described, and its array is missing or of another shape")
        elif name in wanted:
            problems += [
                f"{name}: {difference}" for difference in _differences(records[name], encoded(name, wanted[name])[1])
            ]
    if problems:
        raise ValueError(_refusal(source, problems))
    values = []
    for part, leaves in named:
        fitted = [_fitted(arrays[name], records[name], leaf) for name, leaf in leaves.items()]
        values.append(jax.tree.unflatten(jax.tree.structure(part.value, is_leaf=is_whole), fitted))
    alone = {name: with_unit(decoded(arrays[name], records[name]), records[name]) for name in free & records.keys()}
    results = {key: built(structure, alone) for key, structure in structures.items()}
    for (part, _), value in zip(named, values):
        if part.state is None:
            results[part.key] = value
        else:
            part.state.value = value
    if MODULATOR in alone:
        one.modulator = alone[MODULATOR]
    return {key: results[key] for key in description["more"]}


def _stored_shape(record: Json, array: Array) -> list[int]:
    """The data of a JAX key have one axis more."""
    return (
        [*record["shape"], *jnp.shape(array)[len(record["shape"]) :]] if "key<" in record["dtype"] else record["shape"]
    )


def _other_learner(saved: Json, here: Json) -> list[str]:
    problems = (
        [] if saved["rule"] == here["rule"] else [f"the rule {saved['rule']} was saved, here it is {here['rule']}"]
    )
    both = [name for name in here["options"] if name in saved["options"]]
    pairs = [(name, saved["options"][name], here["options"][name]) for name in both]
    return problems + [
        f"the option {n} was {old!r} when it was saved, here it is {new!r}" for n, old, new in pairs if old != new
    ]


def _differences(saved: Json, here: Json) -> list[str]:
    out = []
    if saved["shape"] != here["shape"] and not saved["kind"] == here["kind"] == "str":
        out.append(f"the shape {tuple(saved['shape'])} was saved, here it is {tuple(here['shape'])}")
    old, new = _computed_dtype(saved), _computed_dtype(here)
    if old != new:
        out.append(f"the dtype {old} was saved, here it is {new}")
    units = [record.get("unit", {"name": "", "dimensions": {}}) for record in (saved, here)]
    if units[0]["dimensions"] != units[1]["dimensions"]:
        old, new = (unit["name"] or "none" for unit in units)
        out.append(f"the unit {old} was saved, here it is {new}")
    return out


def _computed_dtype(record: Json) -> str:
    """That of the array which JAX makes of a leaf."""
    kind, dtype = record["kind"], record["dtype"]
    if kind == "str":
        return "str"
    if kind == "jax" or jnp.dtype(dtype).kind not in "biufcV":
        return dtype
    return str(jnp.result_type(SCALARS[kind]) if kind in SCALARS else jax.dtypes.canonicalize_dtype(dtype))


def _fitted(array: Array, record: Json, like: PyTree) -> PyTree:
    """A saved leaf in the unit, and on the devices, of the one that it replaces."""
    if is_pieces(like):
        pieces = cut_like(decoded(array, record), like)
        return jax.tree.map(lambda v, old: placed(v, old.sharding) if old.committed else v, pieces, like)
    here = like.unit if is_quantity(like) else u.UNITLESS
    value = with_unit(decoded(array, record, like.mantissa if is_quantity(like) else like), record)
    if is_quantity(value):
        if not value.unit.has_same_magnitude(here):
            value = u.Quantity(value.to(here).mantissa.astype(value.dtype), unit=here)
        value = value.mantissa
    return u.Quantity(value, unit=here) if is_quantity(like) else value


def _refusal(source: str, problems: list[str]) -> str:
    shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
    return (
        f"{source} does not fit what it is loaded into, and nothing was loaded:\n  "
        + "\n  ".join(shown)
        + "\nMake the learner as the saved one was made: the same model, rule, options and example inputs. Pass what "
        "was saved with it: optimizer=... (with its parameters registered), and objects that hold states."
    )
