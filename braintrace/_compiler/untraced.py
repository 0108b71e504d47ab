"""What carries a parameter's influence into later steps where no trace follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import brainstate

from .._jax import JaxprEqn, Var, source_line
from .._program import variables
from .._types import Path, path_str, quoted
from .diagnostics import CompilationRecord, DiagnosticKind, DiagnosticLevel
from .flow import Flow, is_product
from .groups import HiddenGroup
from .influence import Influence, differentiable
from .labels import unaligned_axes
from .module_info import ModuleInfo
from .relations import HiddenParamOpRelation

__all__ = ["coupled_groups", "fixed_products", "mixing_transitions", "unmarked_parameters", "untraced_memory"]


def unmarked_parameters(info: ModuleInfo, flow: Flow, influence: Influence) -> list[CompilationRecord]:
    """Parameters that drive hidden states through no marked operation."""
    records = []
    for path, invars in info.weight_path_to_invars.items():
        changed = influence.of(invars, influence.opaque.__contains__)
        driven = influence.driven(changed)
        if not driven:
            continue
        products, met = [], []
        for eqn in influence.eqns:
            inputs = variables(eqn.invars)
            if changed.isdisjoint(inputs) or influence.leading.isdisjoint(eqn.outvars):
                continue
            of_hidden = {s[1] for v in inputs if v not in changed for s in flow.labels.get(v, {}) if s[0] != "y"}
            if is_product(eqn) or (eqn.primitive.name == "mul" and of_hidden):
                products.append((eqn, of_hidden))
            elif not changed.issuperset(inputs):
                met.append(eqn)
        of = sorted({p for _, hidden in products for p in hidden}, key=path_str)
        what = ("multiplies " + quoted(of)) if of else "is used"
        where = [e for e, _ in products] or met
        line = source_line(where[0]) if where else ""
        records.append(
            CompilationRecord(
                DiagnosticKind.RELATION_EXCLUDED_UNMARKED,
                DiagnosticLevel.WARNING,
                f"The parameter {path_str(path)!r} {what} in plain JAX{f' at {line}' if line else ''}, on its way to "
                f"{quoted(driven)}. No trace follows this: it gets the gradient of the current step only. Use "
                f"{_operation(where)} or a layer of braintrace.nn there.",
                weight_path=path,
                hidden_paths=driven,
                context={"line": line},
            )
        )
    return records


def _operation(eqns: Sequence[JaxprEqn]) -> str:
    """What does the same and can be followed."""
    if any(map(is_product, eqns)):
        return "braintrace.matmul"
    plain = {"add", "add_any", "convert_element_type", "div", "mul", "neg", "select_n", "sub"}
    if {e.primitive.name for e in eqns} <= plain:
        return "braintrace.element_wise"
    return "an operation of braintrace (element_wise, embedding, sparse_matmul)"


def untraced_memory(
    info: ModuleInfo, influence: Influence, relations: Sequence[HiddenParamOpRelation], mixing: bool
) -> list[CompilationRecord]:
    """States without a trace that keep what parameters or hidden values did, and are read in a later step.

    Such a state is not hidden, or it is a hidden one of a group of its own that others feed without an operation.
    ``mixing``: traces also follow what hidden values do through operations.
    """
    memory = _Memory(info, influence, {p for r in relations for g in r.hidden_groups for p in g.hidden_paths}, mixing)
    fed = memory.fed()
    onward = {p: influence.untraced(memory.kept[p][0]) for p in fed}
    return [
        CompilationRecord(
            DiagnosticKind.STATE_NOT_HIDDEN,
            DiagnosticLevel.WARNING,
            f"The {type(memory.states[p]).__name__} {path_str(p)!r} keeps what {quoted(fed[p])} did for later steps, "
            f"where {reader}. {memory.why(p, fed[p])}",
            weight_path=next((s for s in fed[p] if s in info.weight_path_to_invars), None),
            hidden_paths=influence.driven(onward[p]),
            context={"state": p},
        )
        for p, reader in memory.readers(fed, onward).items()
    ]


class _Memory:
    """States that no trace follows: their variables before and after the step, who writes and who reads them."""

    def __init__(self, info: ModuleInfo, influence: Influence, traced: set[Path], mixing: bool):
        self.info, self.influence, self.traced, self.mixing = info, influence, traced, mixing
        self.states = dict(zip(info.compiled_state_paths, info.compiled_model_states))
        self.kept: dict[Path, tuple[list[Var], list[Var]]] = {}
        jaxpr = info.jaxpr
        for (path, state), numbers in zip(self.states.items(), info.state_leaves):
            pairs = [(jaxpr.invars[info.first_state + n], jaxpr.outvars[info.num_var_out + n]) for n in numbers]
            pairs = [(old, new) for old, new in pairs if old is not new and len(differentiable([old, new])) == 2]
            if pairs and path not in traced and not isinstance(state, brainstate.ParamState):
                self.kept[path] = [old for old, _ in pairs], [new for _, new in pairs]
        self.hidden = self.kept.keys() & info.hidden_path_to_invar.keys()

    def fed(self) -> dict[Path, list[Path]]:
        """What the states keep: parameters, hidden states, and each other."""
        info, influence, kept = self.info, self.influence, self.kept
        sources = {
            **info.weight_path_to_invars,
            **{p: [v, *variables([info.hidden_path_to_outvar[p]])] for p, v in info.hidden_path_to_invar.items()},
        }
        fed: dict[Path, list[Path]] = {}
        for _ in kept:  # what one of them keeps may come from another one
            starts = {**sources, **{p: kept[p][0] for p in fed}}
            changed = {s: influence.of(vs) for s, vs in starts.items()}
            # By operations and products hidden states make layers: what a lower one did there is another matter.
            followed = {s: vs for s, vs in starts.items() if self.hidden and (s in self.traced or s in fed)}
            direct = {s: influence.untraced(vs) for s, vs in followed.items()}
            found = {p: direct if p in self.hidden else changed for p in kept}
            fed = {p: [s for s, of in found[p].items() if s != p and not of.isdisjoint(kept[p][1])] for p in kept}
            fed = {p: of for p, of in fed.items() if of}
        return fed

    def readers(self, fed: Mapping[Path, list[Path]], onward: Mapping[Path, set[Var]]) -> dict[Path, str]:
        """In words who reads a state in a later step, of those that somebody does."""
        influence, kept = self.influence, self.kept
        outputs = set(variables(self.info.jaxpr.outvars[: self.info.num_var_out])) - influence.flow.members.keys()
        readers: dict[Path, str] = {}
        for p in fed:
            driven = tuple(q for q in influence.driven(onward[p]) if q != p)
            if p in self.hidden and not set(fed[p]).isdisjoint(driven):
                continue  # see `coupled_groups`
            if driven:
                readers[p] = f"{quoted(driven)} {'reads' if len(driven) == 1 else 'read'} it"
                continue
            reached = influence.of([v for vs in kept[p] for v in vs] if p in self.hidden else kept[p][0])
            enters = any(not reached.isdisjoint(variables(op.eqn.invars)) for op in influence.flow.ops)
            if not reached.isdisjoint(outputs):
                readers[p] = "the output reads it"
            elif self._returns(p, fed[p], reached):
                readers[p] = "an operation takes it back there"
            elif onward[p].isdisjoint(kept[p][1]) or isinstance(self.states[p], brainstate.LongTermState):
                continue  # the value of one step, or statistics
            elif not enters:  # it is no delay of what an operation receives
                readers[p] = "a loss may read it"
        for _ in fed:
            for p in fed.keys() - readers.keys():
                if to := [q for q in readers if q != p and not onward[p].isdisjoint(kept[q][1])]:
                    readers[p] = f"{quoted(to)} takes it over"
        return readers

    def _returns(self, path: Path, fed: Sequence[Path], reached: set[Var]) -> bool:
        """Whether a state leads back to the hidden values it keeps, by an operation that traces look through."""
        if not self.mixing or path in self.hidden or isinstance(self.states[path], brainstate.LongTermState):
            return False
        return not set(fed).isdisjoint(self.influence.driven(reached))

    def why(self, path: Path, fed: Sequence[Path]) -> str:
        """Why no trace follows a state, and what to do."""
        kept = {v.aval.shape for v in self.kept[path][1]}
        of_hidden = {v.aval.shape for p, v in self.info.hidden_path_to_invar.items() if p in fed}
        values = of_hidden or {op.y.aval.shape for op in self.influence.flow.ops}
        one_of = ", or several, of the shape of what they keep" if values and kept.isdisjoint(values) else ""
        if self.mixing and path not in self.hidden:
            return (
                "Traces follow hidden states only: what comes back by it gets no credit. Make it a "
                f"brainstate.HiddenState{one_of}."
            )
        delay = " what an operation receives, keep the operation's input, not its output."
        if path not in self.hidden and not one_of:
            return (
                "Traces follow hidden states only: later steps give no gradient for it. Make it a "
                f"brainstate.HiddenState; to delay{delay}"
            )
        return (
            "Traces follow hidden states of one shape, position by position: later steps give no gradient for it. "
            f"To delay{delay}"
        )


def mixing_transitions(
    flow: Flow, groups: Sequence[HiddenGroup], relations: Sequence[HiddenParamOpRelation]
) -> list[CompilationRecord]:
    """Traced groups in which a new value depends on old ones at other positions."""
    records = []
    lasting = {p for p, labels in flow.into.items() if any(s[0] == "old" for s in labels)}
    for group in groups:
        of = _parameters_of([group], relations)
        mixed = [
            p
            for p in group.hidden_paths
            for s, label in flow.into.get(p, {}).items()
            if (s[0] == "old" or (s[0] == "new" and s[1] in lasting))
            and s[1] in group.hidden_paths
            and unaligned_axes(label, group.varshape)
        ]
        if mixed and of:
            records.append(
                CompilationRecord(
                    DiagnosticKind.RECURRENT_MIXING,
                    DiagnosticLevel.WARNING,
                    f"The new value of {quoted(dict.fromkeys(mixed))} depends on old values at other positions. Traces "
                    f"of {quoted(of)} keep what a position does to itself only; the current step is exact. Use a rule "
                    "that sees the mixing (OSTLRecurrent, SnAp, UORO), or leave the mixing out.",
                    weight_path=of[0],
                    hidden_paths=tuple(dict.fromkeys(mixed)),
                )
            )
    return records


def fixed_products(
    info: ModuleInfo,
    flow: Flow,
    influence: Influence,
    groups: Sequence[HiddenGroup],
    relations: Sequence[HiddenParamOpRelation],
) -> list[CompilationRecord]:
    """Products without a parameter with which hidden values of a traced group reach the group again."""
    opaque, records = influence.opaque.__contains__, []
    trained = influence.of([v for invars in info.weight_path_to_invars.values() for v in invars], opaque)
    for position, eqn in enumerate(influence.eqns):
        inputs = variables(eqn.invars)
        if position in influence.opaque or not is_product(eqn) or not trained.isdisjoint(inputs):
            continue
        kept = {s for v in eqn.outvars for s in flow.labels.get(v, {})}
        cut = {s[1] for v in inputs for s in flow.labels.get(v, {}) if s[0] != "y" and s not in kept}
        driven = set(influence.driven(influence.of(eqn.outvars, opaque))) if cut else set()
        for group in groups:
            sources, targets = (tuple(p for p in group.hidden_paths if p in of) for of in (cut, driven))
            of = _parameters_of([group], relations)
            if not (sources and targets and of):
                continue
            line = source_line(eqn)
            records.append(
                CompilationRecord(
                    DiagnosticKind.RECURRENT_MIXING,
                    DiagnosticLevel.WARNING,
                    f"The {eqn.primitive.name}{f' at {line}' if line else ''} takes {quoted(sources)} to "
                    f"{quoted(targets)} without a parameter. Traces of {quoted(of)} leave it out, as they do every "
                    "product of hidden values, with what a position does to itself in it; the current step is exact. "
                    "Use a rule that sees the mixing (OSTLRecurrent, SnAp, UORO), or write what a position does to "
                    "itself apart from it.",
                    weight_path=of[0],
                    hidden_paths=tuple(dict.fromkeys((*sources, *targets))),
                )
            )
    return records


def coupled_groups(
    flow: Flow, groups: Sequence[HiddenGroup], relations: Sequence[HiddenParamOpRelation]
) -> list[CompilationRecord]:
    """Groups that depend on each other, both ways, and yet are no one group; as far as ``flow`` sees."""
    group_of = {p: g.index for g in groups for p in g.hidden_paths}
    follows: dict[int, set[int]] = {g.index: set() for g in groups}
    for target, labels in flow.into.items():
        for kind, source in labels:
            if kind != "y" and group_of[source] != group_of[target]:
                follows[group_of[source]].add(group_of[target])
    while True:
        further = {i: to.union(*(follows[j] for j in to)) for i, to in follows.items()}
        if further == follows:
            break
        follows = further
    circles = dict.fromkeys(tuple(sorted(j for j in to if i in follows[j])) for i, to in follows.items() if i in to)
    records = []
    for circle in circles:
        members = [groups[i] for i in circle]
        paths = tuple(p for g in members for p in g.hidden_paths)
        of = _parameters_of(members, relations)
        shapes = list(dict.fromkeys(g.varshape for g in members))
        why = f"have the shapes {', '.join(map(str, shapes))}" if len(shapes) > 1 else "mix positions"
        if of:
            records.append(
                CompilationRecord(
                    DiagnosticKind.RECURRENT_MIXING,
                    DiagnosticLevel.WARNING,
                    f"The hidden states {quoted(paths)} depend on each other, and {why}, so that they form "
                    f"{len(members)} groups. Traces of {quoted(of)} keep what a group does to itself; what it does to "
                    "another one and back gets no credit in later steps. Give states of the same units one shape, or "
                    "several values per unit as a brainstate.HiddenGroupState of shape (..., k).",
                    weight_path=of[0],
                    hidden_paths=paths,
                )
            )
    return records


def _parameters_of(groups: Sequence[HiddenGroup], relations: Sequence[HiddenParamOpRelation]) -> list[Path]:
    """Those that have traces in some of the groups."""
    found = (p for r in relations if any(g in r.hidden_groups for g in groups) for p in r.parameter_paths)
    return list(dict.fromkeys(found))
