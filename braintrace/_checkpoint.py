"""A run as named arrays, in a file or a dictionary: what it needs to go on, and what has to fit when it does."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import types
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._compiler.policy import ControlFlowPolicy
from ._engines.pieces import cut_like, is_pieces, joined
from ._jax import is_tracer, placed
from ._learners.base import ETraceAlgorithm
from ._sequence import SequenceDriverMixin
from ._types import Path, path_str

__all__ = ["load", "load_state_dict", "save", "state_dict"]

FORMAT, VERSION = "braintrace checkpoint", 1
DESCRIPTION = "description"  # among arrays, the bytes of a JSON text; in a file, a text of its own
_TEXT = f"{DESCRIPTION}.json"
_BASE_UNITS = ("m", "kg", "s", "A", "K", "mol", "cd")
_SCALARS = {"bool": bool, "int": int, "float": float, "complex": complex}
_SHOWN = 20
MODULATOR = "learner/modulator"


def save(path: str | os.PathLike[str], learner: Any, optimizer: Any = None, **more: Any) -> None:
    """Write a run to a file, whole or not at all.

    Saved are the states of the model (parameters, hidden and other states), traces and step counter, everything else
    that the learner holds (random projections, the modulator, the states of a synthesizer), the random states that
    the step reads and ``brainstate.random.DEFAULT``, the states of the optimiser, and what is given by name.

    Parameters
    ----------
    path : str or path
        The file, usually with the ending ``.npz``. It is written under another name in the same folder, and replaces
        what was there at the end.
    learner : ETraceAlgorithm or brainstate.nn.Vmap
        A compiled learner, or what maps one.
    optimizer : optional
        An object that holds ``brainstate.State`` objects, such as one of ``braintools.optim``.
    **more : pytree, or object that holds states
        Arrays of any shape, with units or without, JAX keys, Python numbers and strings, in any pytree (an optax state,
        say); or an object whose states are saved like those of the optimiser.

    Raises
    ------
    TypeError
        If ``learner`` is no learner, ``optimizer`` holds no state, or a leaf is no array, number or string.
    ValueError
        If the learner is not compiled, or under ``jit``.
    OSError
        If the file cannot be written, by whichever process.

    Notes
    -----
    Where arrays are spread over several processes, all of them have to call this: the arrays are gathered, one process
    writes, and the others wait for it. :func:`load` then reads the file in each of them.

    The file is a ``.npz`` archive: ``numpy.load(path)['model/...']`` is an array. The entry ``description.json`` is a
    text with shapes, dtypes and units. Types that NumPy does not know (bfloat16) are unsigned integers of the same
    bits. A process that is killed while it saves leaves a hidden file ``.name.*.tmp``, which nothing reads.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp, tempfile
    >>> learner = braintrace.compile(braintrace.nn.GRUCell(2, 3), 'd_rtrl', jnp.zeros(2))
    >>> folder = tempfile.TemporaryDirectory()
    >>> braintrace.save(folder.name + '/run.npz', learner, step=7)
    >>> braintrace.load(folder.name + '/run.npz', learner)
    {'step': 7}
    """
    arrays = state_dict(learner, optimizer, **more)
    shared: list[Any] = [a for a in arrays.values() if isinstance(a, jax.Array) and not a.is_fully_addressable]
    if not shared:
        return _write(path, arrays)
    arrays = {name: _gathered(a) for name, a in arrays.items()}
    writer = min(device.process_index for device in shared[0].sharding.device_set)
    error = None
    if jax.process_index() == writer:
        try:
            _write(path, arrays)
        except Exception as caught:
            error = caught
    failed = _anywhere(error is not None, shared[0])
    if error is not None:
        raise error
    if failed:
        raise OSError(f"Process {writer}, which writes for all, could not write {os.fspath(path)!r}; it says why.")


def _gathered(array: Any) -> Any:
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    return array if whole else multihost_utils.process_allgather(array, tiled=True)


def _anywhere(here: bool, shared: Any) -> bool:
    """Whether something is so in one of the processes that have a part of an array; they wait for each other."""
    devices = np.array(sorted(shared.sharding.device_set, key=lambda device: device.id))
    sharding = NamedSharding(Mesh(devices, ("all",)), PartitionSpec("all"))
    flags = jax.make_array_from_callback(devices.shape, sharding, lambda _: np.full(1, here, np.int32))
    return bool(_gathered(flags).any())


def _write(path: str | os.PathLike[str], arrays: dict[str, Any]) -> None:
    description = json.loads(bytes(arrays.pop(DESCRIPTION)))
    versions = {m.__name__: m.__version__ for m in (jax, brainstate, u, np)}
    text = json.dumps({**description, "written_with": versions}, indent=1, ensure_ascii=False)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_TEXT, text)
                for key, array in arrays.items():
                    with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, _for_numpy(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name is on the disk too
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str | os.PathLike[str], learner: Any, optimizer: Any = None, **more: Any) -> dict[str, Any]:
    """Read a run from a file of :func:`save` into a learner that was made in the same way.

    The state objects stay, so that functions which were jitted before go on with the new values. Of a quantity the
    dimension must fit; the value is converted to the unit that the state has. An array gets the sharding of the one
    that it replaces.

    Parameters
    ----------
    path : str or path
    learner : ETraceAlgorithm or brainstate.nn.Vmap
        Compiled, with the model, rule, options and sizes of the one that was saved; its values do not matter.
    optimizer : optional
        Needed if one was saved, with the parameters registered.
    **more : pytree, or object that holds states
        What was saved by name. An object gets its states' values. A pytree gives the structure that the saved one is
        returned in, and its shapes, dtypes and units are checked; what is left out here is returned in dicts, lists and
        tuples, with a dict for every other kind of node.

    Returns
    -------
    dict
        Name -> pytree, for all that was saved by name, but for objects that hold states.

    Raises
    ------
    ValueError
        If the file is truncated, no checkpoint, or of a newer format; if it does not fit: a path is missing or
        unexpected, has another shape, dtype or dimension, or the rule or its options differ. Nothing is loaded then.
    TypeError
        If ``learner`` is no learner, or ``optimizer`` holds no state.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import braintrace, jax.numpy as jnp, tempfile
    >>> make = lambda: braintrace.compile(braintrace.nn.GRUCell(2, 3), 'd_rtrl', jnp.zeros(2))
    >>> first, second = make(), make()
    >>> _ = first(jnp.ones(2))
    >>> folder = tempfile.TemporaryDirectory()
    >>> braintrace.save(folder.name + '/run.npz', first)
    >>> braintrace.load(folder.name + '/run.npz', second)
    {}
    >>> bool((first(jnp.ones(2)) == second(jnp.ones(2))).all())
    True
    """
    source = os.fspath(path)
    with _whole(source):
        archive = zipfile.ZipFile(path)
    with archive:
        with _whole(source):
            text = archive.read(_TEXT)
        description = _described(text, source)
        with _whole(source):
            arrays = {name: _array(archive, name) for name in description["arrays"]}
    return _restore(source, description, arrays, learner, optimizer, more)


def state_dict(learner: Any, optimizer: Any = None, **more: Any) -> dict[str, Any]:
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
    for part, leaves in _named(_parts(learner, optimizer, more)):
        for name, leaf in leaves.items():
            arrays[name], records[name] = _encoded(name, leaf)
        if part.key is not None:
            structures[part.key] = _structure(part.value, iter(leaves))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "learner": _identity(_learner_of(learner)),
        "arrays": records,
        "more": structures,
    }
    if jax.process_count() > 1:  # what lies in this process alone is the same in all; orbax takes it as a NumPy array
        arrays = {
            k: v if getattr(v, "is_fully_addressable", True) is False else np.asarray(v) for k, v in arrays.items()
        }
    text = json.dumps(description, ensure_ascii=False)
    return {DESCRIPTION: np.frombuffer(text.encode(), np.uint8), **arrays}


def load_state_dict(learner: Any, arrays: Mapping[str, Any], optimizer: Any = None, **more: Any) -> dict[str, Any]:
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
    description = _described(np.asarray(rest.pop(DESCRIPTION)).tobytes(), source)
    return _restore(source, description, rest, learner, optimizer, more)


# -- what belongs to a run --------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A pytree under a name; it is the value of a state, or was given under a key."""

    name: str
    value: Any
    state: brainstate.State | None = None
    key: str | None = None


def _parts(learner: Any, optimizer: Any, more: Mapping[str, Any]) -> list[Part]:
    one = _learner_of(learner)
    known: dict[int, brainstate.State] = {}
    parts = []

    def add(prefix: str, states: Iterable[tuple[Path, brainstate.State]]) -> None:
        for path, state in states:
            if id(state) not in known:
                known[id(state)] = state
                parts.append(Part("/".join((prefix, *map(_segment, path))), state.value, state))

    now = one.model4compile.states()
    add("random", [(("default",), brainstate.random.DEFAULT)])
    add("model", now.items())
    unnamed = (((i,), state) for i, (path, state) in enumerate(one.path_to_states.items()) if path not in now)
    add("model/unnamed", unnamed)
    model = {id(state) for state in now.values()}
    add("learner", ((p, s) for p, s in one.states().items() if id(s) not in model and p != ("_modulator",)))
    if getattr(one, "modulator", None) is not None:
        parts.append(Part(MODULATOR, one.modulator))
    if getattr(one, "synthesizer", None) is not None:
        add("synthesizer", _states_in(one.synthesizer))
    if optimizer is not None:
        found = list(_states_in(optimizer))
        if not found:
            raise TypeError(
                f"The optimizer, a {type(optimizer).__name__}, holds no brainstate.State that could be given a value. "
                "Pass the pytree of an optax state under a name: opt_state=..."
            )
        add("optimizer", found)
    for key, value in more.items():
        states = list(_states_in(value))
        if states and any(map(_is_leaf, jax.tree.leaves(value, is_leaf=_is_state))):
            raise TypeError(f"{key} holds states beside arrays, numbers or strings. Pass them under two names.")
        add(f"more/{key}", states)
        parts += [] if states else [Part(f"more/{key}", value, key=key)]
    return parts


def _named(parts: list[Part]) -> list[tuple[Part, dict[str, Any]]]:
    """The leaves of every part by names, which are numbered where they would be the same."""
    counts: collections.Counter[str] = collections.Counter()
    out = []
    for part in parts:
        leaves = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(part.value, is_leaf=_is_whole)[0]:
            name = "/".join((part.name, *map(_entry, path)))
            leaves[f"{name}#{counts[name]}" if counts[name] else name] = leaf
            counts[name] += 1
        out.append((part, leaves))
    return out


def _learner_of(learner: Any) -> ETraceAlgorithm:
    one = learner
    while not isinstance(one, ETraceAlgorithm) and isinstance(one, brainstate.nn.Module) and hasattr(one, "module"):
        one = one.module
    if not isinstance(one, ETraceAlgorithm):
        raise TypeError(
            f"learner must be a braintrace learner or a brainstate.nn.Vmap of one, got {type(learner).__name__}. Pass "
            "what braintrace.compile has returned."
        )
    if not one.is_compiled:
        raise ValueError(
            f"This {type(one).__name__} is not compiled, so it has no traces yet. Call compile_graph(*example_inputs) "
            "first."
        )
    return one


def _states_in(found: Any) -> Iterator[tuple[tuple[Any, ...], brainstate.State]]:
    """States that an object holds, by the attributes and keys that reach them."""
    closed = (str, bytes, np.ndarray, jax.Array, type, types.ModuleType, types.FunctionType, SequenceDriverMixin)
    seen: dict[int, Any] = {}

    def walk(x: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], brainstate.State]]:
        if id(x) in seen or isinstance(x, closed):
            return
        seen[id(x)] = x
        if _is_state(x):
            yield path, x
        elif isinstance(x, Mapping):
            for key, value in x.items():
                yield from walk(value, (*path, key))
        elif isinstance(x, (list, tuple)):
            for i, value in enumerate(x):
                yield from walk(value, (*path, i))
        else:
            for key, value in getattr(x, "__dict__", {}).items():
                yield from walk(value, (*path, key))

    return walk(found, ())


def _identity(learner: ETraceAlgorithm) -> dict[str, Any]:
    """The rule and those of its options that results depend on, as JSON has them."""
    config = getattr(learner, "config", None)
    policy = learner.executor.control_flow or ControlFlowPolicy()
    options = {} if config is None else dataclasses.asdict(config)
    for name in ("vjp_method", "trace_dtype", "projection_eps"):
        value = getattr(learner, name, None)
        options[name] = value if isinstance(value, (float, type(None))) else str(value)
    for name, key in (("projection_key", "projection_key"), ("random_feedback_key", "_feedback_key")):
        options[name] = _plain_key(getattr(learner, key, None))
    options |= {f"control_flow.{k}": v for k, v in dataclasses.asdict(policy).items()}
    return json.loads(json.dumps({"rule": type(learner).__name__, "options": options}))


def _plain_key(key: Any) -> Any:
    if key is None:
        return None
    key = jax.random.key(key) if isinstance(key, int) else key
    return np.asarray(jax.random.key_data(key) if _is_key(key) else key).tolist()


# -- names ------------------------------------------------------------------------------------------------------------

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _segment(key: Any) -> str:
    text = ".".join(map(_segment, key)) if isinstance(key, tuple) else path_str((key,))
    return _ADDRESS.sub("", text)


def _entry(entry: Any) -> str:
    """One step into a pytree."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return _segment(getattr(entry, attribute))
    return str(entry)


def _structure(tree: Any, names: Iterator[str]) -> Any:
    """A pytree as JSON: names of leaves in tagged containers."""
    if tree is None:
        return {"none": None}
    below = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree or _is_quantity(x))[0]
    if below and not below[0][0]:
        return next(names)
    children = [_structure(child, names) for _, child in below]
    if type(tree) in (list, tuple):
        return {type(tree).__name__: children}
    plain = type(tree) is dict and all(isinstance(key, (str, int)) for key in tree)
    keys = [path[0].key if plain else _entry(path[0]) for path, _ in below]
    return {"dict": [list(pair) for pair in zip(keys, children)]}


def _built(structure: Any, leaves: Mapping[str, Any]) -> Any:
    if isinstance(structure, str):
        return leaves[structure]
    ((kind, children),) = structure.items()
    if kind == "none":
        return None
    if kind == "dict":
        return {key: _built(child, leaves) for key, child in children}
    return {"list": list, "tuple": tuple}[kind](_built(child, leaves) for child in children)


def _names(structure: Any) -> Iterator[str]:
    if isinstance(structure, str):
        yield structure
    else:
        ((kind, children),) = structure.items()
        for child in children or ():
            yield from _names(child[1] if kind == "dict" else child)


# -- leaves -----------------------------------------------------------------------------------------------------------


def _is_quantity(x: Any) -> bool:
    return isinstance(x, u.Quantity)


def _is_whole(x: Any) -> bool:
    return _is_quantity(x) or is_pieces(x)


def _is_state(x: Any) -> bool:
    return isinstance(x, brainstate.State)


def _is_leaf(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float, complex, str))


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _encoded(name: str, leaf: Any) -> tuple[Any, dict[str, Any]]:
    """A leaf as an array, and what is to be known beside it."""
    if is_pieces(leaf):
        return _encoded(name, joined(leaf))
    if _is_quantity(leaf):
        array, record = _encoded(name, leaf.mantissa)
        return array, {**record, "unit": _unit_record(leaf.unit)}
    if is_tracer(leaf):
        raise ValueError(f"{name} has no value within jit, grad or vmap. Save and load outside of them.")
    if _is_key(leaf):
        record = {"kind": "jax", "shape": list(leaf.shape), "dtype": f"key<{jax.random.key_impl(leaf)}>"}
        return jax.random.key_data(leaf), record
    if isinstance(leaf, jax.Array):
        record = {"kind": "jax", "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        return leaf, {**record, "weak_type": True} if leaf.weak_type else record
    if isinstance(leaf, str):
        array = np.frombuffer(leaf.encode(), np.uint8)
        return array, {"kind": "str", "shape": list(array.shape), "dtype": "uint8"}
    if _is_leaf(leaf):
        array = np.array(leaf)
        if array.dtype != object:
            kind = type(leaf).__name__ if type(leaf) in _SCALARS.values() else "numpy"
            return array, {"kind": kind, "shape": list(array.shape), "dtype": str(array.dtype)}
    raise TypeError(
        f"{name} is {leaf!r} of type {type(leaf).__name__}, which is no array, number (of 64 bits) or string. Leave it "
        "out, or turn it into these."
    )


def _for_numpy(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.isbuiltin == 2 else array


def _decoded(array: Any, record: Mapping[str, Any], like: Any = None) -> Any:
    """The leaf that was saved, without its unit; ``like`` is the one that it replaces."""
    kind, dtype = record["kind"], record["dtype"]
    if kind == "str":
        return np.asarray(array).tobytes().decode()
    if kind in _SCALARS:
        return _SCALARS[kind](np.asarray(array).item())
    is_key = dtype.startswith("key<")
    if not is_key:
        own = jnp.dtype(dtype)
        if array.dtype != own and own.isbuiltin == 2:
            array = np.asarray(array).view(own)
        if kind == "numpy" or jax.dtypes.canonicalize_dtype(own) != own:
            return np.array(array)
    value = array if isinstance(array, jax.Array) else jnp.array(array)
    if is_key:
        value = jax.random.wrap_key_data(value, impl=dtype[4:-1])
    if record.get("weak_type"):
        value = jnp.broadcast_to(jnp.asarray(_zero(value.dtype)), value.shape).at[...].set(value)
    if isinstance(like, jax.Array) and like.committed:
        value = placed(value, like.sharding)
    return value


def _zero(dtype: Any) -> Any:
    """Of the Python type that makes a weak array of this dtype."""
    return np.zeros((), dtype).item()


def _unit_record(unit: Any) -> dict[str, Any]:
    powers = {base: float(unit.dim.get_dimension(base)) for base in _BASE_UNITS}
    scales = {name: float(getattr(unit, name)) for name in ("scale", "base", "factor")}
    return {"name": str(unit), "dimensions": {k: p for k, p in powers.items() if p}, **scales}


def _unit(record: Mapping[str, Any]) -> Any:
    dim = u.get_or_create_dimension([record["dimensions"].get(k, 0) for k in _BASE_UNITS])
    scales = {name: record[name] for name in ("scale", "base", "factor")}
    return u.Unit(dim, name=record["name"], dispname=record["name"], **scales)


# -- fitting ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(source: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{source} is no checkpoint, or not all of one ({error}). Pass a file that braintrace.save has written."
        ) from error


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as entry:
        return np.lib.format.read_array(entry, allow_pickle=False)


def _described(text: bytes, source: str) -> dict[str, Any]:
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


def _restore(
    source: str,
    description: Mapping[str, Any],
    arrays: Mapping[str, Any],
    learner: Any,
    optimizer: Any,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    one = _learner_of(learner)
    records = description["arrays"]
    named = _named(_parts(learner, optimizer, more))
    if MODULATOR in records:  # it takes any value, as by assignment
        named = [(part, leaves) for part, leaves in named if part.name != MODULATOR]
    structures = {key: s for key, s in description["more"].items() if key not in more}
    free = {MODULATOR, *(name for s in structures.values() for name in _names(s))}
    wanted = {name: leaf for _, leaves in named for name, leaf in leaves.items()}
    problems = _other_learner(description["learner"], _identity(one))
    for name in sorted(wanted.keys() | records.keys()):
        if name not in records:
            problems.append(f"{name}: is here, and was not saved")
        elif name not in wanted and name not in free:
            problems.append(f"{name}: was saved, and is not here")
        elif name not in arrays or list(jnp.shape(arrays[name])) != _stored_shape(records[name], arrays[name]):
            problems.append(f"{name}: is described, and its array is missing or of another shape")
        elif name in wanted:
            problems += [
                f"{name}: {difference}" for difference in _differences(records[name], _encoded(name, wanted[name])[1])
            ]
    if problems:
        raise ValueError(_refusal(source, problems))
    values = []
    for part, leaves in named:
        tree: Any = jax.tree.structure(part.value, is_leaf=_is_whole)
        values.append(tree.unflatten([_fitted(arrays[name], records[name], leaf) for name, leaf in leaves.items()]))
    alone = {name: _with_unit(_decoded(arrays[name], records[name]), records[name]) for name in free & records.keys()}
    results = {key: _built(structure, alone) for key, structure in structures.items()}
    for (part, _), value in zip(named, values):
        if part.state is None:
            results[part.key] = value
        else:
            part.state.value = value
    if MODULATOR in alone:
        one.modulator = alone[MODULATOR]
    return {key: results[key] for key in description["more"]}


def _stored_shape(record: Mapping[str, Any], array: Any) -> list[int]:
    """The data of a JAX key have one axis more."""
    return (
        [*record["shape"], *jnp.shape(array)[len(record["shape"]) :]] if "key<" in record["dtype"] else record["shape"]
    )


def _other_learner(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    problems = (
        [] if saved["rule"] == here["rule"] else [f"the rule {saved['rule']} was saved, here it is {here['rule']}"]
    )
    both = [name for name in here["options"] if name in saved["options"]]
    pairs = [(name, saved["options"][name], here["options"][name]) for name in both]
    return problems + [
        f"the option {n} was {old!r} when it was saved, here it is {new!r}" for n, old, new in pairs if old != new
    ]


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
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


def _computed_dtype(record: Mapping[str, Any]) -> str:
    """That of the array which JAX makes of a leaf."""
    kind, dtype = record["kind"], record["dtype"]
    if kind == "str":
        return "str"
    if kind == "jax" or jnp.dtype(dtype).kind not in "biufcV":
        return dtype
    return str(jnp.result_type(_SCALARS[kind]) if kind in _SCALARS else jax.dtypes.canonicalize_dtype(dtype))


def _fitted(array: Any, record: Mapping[str, Any], like: Any) -> Any:
    """A saved leaf in the unit, and on the devices, of the one that it replaces."""
    if is_pieces(like):
        pieces = cut_like(_decoded(array, record), like)
        return jax.tree.map(lambda v, old: placed(v, old.sharding) if old.committed else v, pieces, like)
    here = like.unit if _is_quantity(like) else u.UNITLESS
    value = _with_unit(_decoded(array, record, like.mantissa if _is_quantity(like) else like), record)
    if _is_quantity(value):
        if not value.unit.has_same_magnitude(here):
            value = u.Quantity(value.to(here).mantissa.astype(value.dtype), unit=here)
        value = value.mantissa
    return u.Quantity(value, unit=here) if _is_quantity(like) else value


def _with_unit(value: Any, record: Mapping[str, Any]) -> Any:
    return u.Quantity(value, unit=_unit(record["unit"])) if "unit" in record else value


def _refusal(source: str, problems: list[str]) -> str:
    shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
    return (
        f"{source} does not fit what it is loaded into, and nothing was loaded:\n  "
        + "\n  ".join(shown)
        + "\nMake the learner as the saved one was made: the same model, rule, options and example inputs. Pass what "
        "was saved with it: optimizer=... (with its parameters registered), and objects that hold states."
    )
