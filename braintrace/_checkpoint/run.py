"""What belongs to a run, part by part, and which rule and options its results depend on."""

from __future__ import annotations

import collections
import dataclasses
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import brainstate
import jax
import numpy as np
from jax.typing import ArrayLike

from .._compiler.policy import ControlFlowPolicy
from .._learners.base import ETraceAlgorithm
from .._learners.signals import as_key
from .._sequence import SequenceDriverMixin
from .._types import Path, PyTree, path_str
from .leaves import Json, is_leaf, is_state, is_whole
from .names import entry_name, segment_name

__all__ = ["MODULATOR", "Learner", "identity_of", "learner_of", "named_leaves", "parts_of"]

Learner: TypeAlias = ETraceAlgorithm | brainstate.nn.Vmap

MODULATOR = "learner/modulator"


class Part(NamedTuple):
    """A pytree under a name; it is the value of a state, or was given under a key."""

    name: str
    value: PyTree
    state: brainstate.State | None = None
    key: str | None = None


def parts_of(learner: Learner, optimizer: object, more: Mapping[str, PyTree]) -> list[Part]:
    one = learner_of(learner)
    known: dict[int, brainstate.State] = {}
    parts = []

    def add(prefix: str, states: Iterable[tuple[Path, brainstate.State]]) -> None:
        for path, state in states:
            if id(state) not in known:
                known[id(state)] = state
                parts.append(Part("/".join((prefix, *map(segment_name, path))), state.value, state))

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
        if states and any(map(is_leaf, jax.tree.leaves(value, is_leaf=is_state))):
            raise TypeError(f"{key} holds states beside arrays, numbers or strings. Pass them under two names.")
        add(f"more/{key}", states)
        parts += [] if states else [Part(f"more/{key}", value, key=key)]
    return parts


def named_leaves(parts: list[Part]) -> list[tuple[Part, dict[str, PyTree]]]:
    """The leaves of every part by names, which are numbered where they would be the same."""
    counts: collections.Counter[str] = collections.Counter()
    out = []
    for part in parts:
        leaves = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(part.value, is_leaf=is_whole)[0]:
            name = "/".join((part.name, *map(entry_name, path)))
            leaves[f"{name}#{counts[name]}" if counts[name] else name] = leaf
            counts[name] += 1
        out.append((part, leaves))
    return out


def learner_of(learner: Learner) -> ETraceAlgorithm:
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


def _states_in(found: object) -> Iterator[tuple[Path, brainstate.State]]:
    """States that an object holds, by the attributes and keys that reach them."""
    closed = (str, bytes, np.ndarray, jax.Array, type, types.ModuleType, types.FunctionType, SequenceDriverMixin)
    seen: dict[int, object] = {}

    def walk(x: object, path: Path) -> Iterator[tuple[Path, brainstate.State]]:
        if id(x) in seen or isinstance(x, closed):
            return
        seen[id(x)] = x
        if is_state(x):
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


def identity_of(learner: ETraceAlgorithm) -> Json:
    """The rule and those of its options that results depend on, as JSON has them."""
    config = getattr(learner, "config", None)
    policy = learner.executor.control_flow or ControlFlowPolicy()
    options = {} if config is None else dataclasses.asdict(config)
    for name in ("vjp_method", "trace_dtype", "projection_eps"):
        value = getattr(learner, name, None)
        options[name] = value if isinstance(value, (float, type(None))) else str(value)
    for name, key in (("projection_key", "projection_key"), ("random_feedback_key", "_feedback_key")):
        options[name] = _plain_key(getattr(learner, key, None))
    decays = getattr(learner, "_decays", None)
    if decays is not None:
        relations = learner.graph.hidden_param_op_relations
        options["decays"] = {path_str(relations[i].path): pair for i, pair in decays.of(relations).items()}
    options |= {f"control_flow.{k}": v for k, v in dataclasses.asdict(policy).items()}
    return json.loads(json.dumps({"rule": type(learner).__name__, "options": options}))


def _plain_key(key: ArrayLike | None) -> object:
    return None if key is None else np.asarray(jax.random.key_data(as_key("key", key))).tolist()
