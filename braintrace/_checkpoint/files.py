"""A run in one file, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import zipfile
from collections.abc import Iterator

import brainstate
import brainunit as u
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._types import PyTree
from .dicts import DESCRIPTION, description_of, restored, state_dict
from .leaves import Array, for_numpy
from .run import Learner

__all__ = ["load", "save"]

_TEXT = f"{DESCRIPTION}.json"


def save(path: str | os.PathLike[str], learner: Learner, optimizer: object = None, **more: PyTree) -> None:
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
    shared: list[PyTree] = [a for a in arrays.values() if isinstance(a, jax.Array) and not a.is_fully_addressable]
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


def _gathered(array: Array) -> Array:
    whole = not isinstance(array, jax.Array) or array.is_fully_addressable
    return array if whole else multihost_utils.process_allgather(array, tiled=True)


def _anywhere(here: bool, shared: PyTree) -> bool:
    """Whether something is so in one of the processes that have a part of an array; they wait for each other."""
    devices = np.array(sorted(shared.sharding.device_set, key=lambda device: device.id))
    sharding = NamedSharding(Mesh(devices, ("all",)), PartitionSpec("all"))
    flags = jax.make_array_from_callback(devices.shape, sharding, lambda _: np.full(1, here, np.int32))
    return bool(_gathered(flags).any())


def _write(path: str | os.PathLike[str], arrays: dict[str, Array]) -> None:
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
                        np.lib.format.write_array(entry, for_numpy(array), allow_pickle=False)
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


def load(path: str | os.PathLike[str], learner: Learner, optimizer: object = None, **more: PyTree) -> dict[str, PyTree]:
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
        description = description_of(text, source)
        with _whole(source):
            arrays = {name: _array(archive, name) for name in description["arrays"]}
    return restored(source, description, arrays, learner, optimizer, more)


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
