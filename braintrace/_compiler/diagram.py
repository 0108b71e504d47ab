"""A compiled model as a diagram: what is traced, what gets the current step only, what is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .._jax import Literal
from .._types import path_str
from .flow import Flow, analyse_flow
from .graph import ETraceGraph
from .relations import operand_program

__all__ = ["mermaid"]

TRACED, CURRENT, CUT = "==>|traced|", "-.->|current step|", "--x|cut|"
Source = tuple[str, Any]  # ('old', path), ('new', path), ('y', operation index) or ('in', None)


def mermaid(graph: ETraceGraph) -> str:
    """Operations, hidden groups, input and output, and how credit passes between them."""
    flow = analyse_flow(graph.module_info)
    sources = _direct_sources(graph, flow)
    lines = ["flowchart LR", "  x([input])"]
    lines += [f'  op{op.index}["{_name(graph, flow, op)}"]' for op in flow.ops]
    for g in graph.hidden_groups:
        members = ", ".join(map(path_str, g.hidden_paths))
        lines.append(f'  g{g.index}[("{_quoted(members)}<br/>shape {g.varshape}, S = {g.num_state}")]')
    lines.append("  out([output])")
    edges = dict.fromkeys(
        [*_into_operations(graph, flow, sources), *_into_groups(graph, sources), *_out(graph, sources)]
    )
    return "\n".join([*lines, *(f"  {edge}" for edge in edges)])


def _name(graph: ETraceGraph, flow: Flow, op: Any) -> str:
    paths = dict.fromkeys(map(path_str, operand_program(graph.module_info, flow, op)[1].values()))
    return _quoted("<br/>".join([*(paths or ["constant"]), op.title]))


def _quoted(text: str) -> str:
    return text.replace('"', "#quot;")


def _direct_sources(graph: ETraceGraph, flow: Flow) -> dict[Any, frozenset[Source]]:
    """Per variable, what it depends on without passing a hidden value or an operation; key ``('into', path)``: what a
    new hidden value is computed from."""
    info = graph.module_info
    of: dict[Any, frozenset[Source]] = {v: frozenset([("in", None)]) for v in info.jaxpr.invars}
    of |= {v: frozenset[Source]() for v in info.invar_to_weight_path}
    of |= {v: frozenset([("old", p)]) for p, v in info.hidden_path_to_invar.items()}
    op_at = {op.position: op for op in flow.ops}

    def read(variables: Sequence[Any]) -> frozenset[Source]:
        return frozenset[Source]().union(*(of.get(v, ()) for v in variables if not isinstance(v, Literal)))

    for position, eqn in enumerate(info.jaxpr.eqns):
        inputs = read(eqn.invars)
        op = op_at.get(position)
        if op is not None:
            of["op", op.index] = inputs
        for var in eqn.outvars:
            own: frozenset[Source] = inputs if op is None else frozenset([("y", op.index)])
            for path in flow.members.get(var, ()):
                of["into", path] = own
            members = flow.members.get(var)
            of[var] = own if members is None else frozenset([("new", members[0])])
    for path, var in info.hidden_path_to_outvar.items():
        of.setdefault(("into", path), read([var]))
    return of


def _node(graph: ETraceGraph, source: Source) -> str:
    kind, what = source
    return "x" if kind == "in" else f"op{what}" if kind == "y" else f"g{graph.hid_path_to_group[what].index}"


def _into_operations(graph: ETraceGraph, flow: Flow, sources: dict[Any, Any]) -> Iterator[str]:
    for op in flow.ops:
        for source in sorted(sources["op", op.index], key=str):
            link = {"in": "-->", "old": CUT}.get(source[0], CURRENT)
            yield f"{_node(graph, source)} {link} op{op.index}"


def _into_groups(graph: ETraceGraph, sources: dict[Any, Any]) -> Iterator[str]:
    traced = {(r.op_index, g.index) for r in graph.hidden_param_op_relations for g in r.hidden_groups}
    for g in graph.hidden_groups:
        if any(entry.kind != "zero" for row in g.cut.D for entry in row):
            yield f"g{g.index} ==>|D| g{g.index}"
        for source in sorted({s for p in g.hidden_paths for s in sources["into", p]}, key=str):
            node, (kind, what) = _node(graph, source), source
            if kind == "y":
                yield f"{node} {TRACED if (what, g.index) in traced else CURRENT} g{g.index}"
            elif kind == "in":
                yield f"{node} --> g{g.index}"
            elif node != f"g{g.index}":
                yield f"{node} {CUT if kind == 'old' else CURRENT} g{g.index}"


def _out(graph: ETraceGraph, sources: dict[Any, Any]) -> Iterator[str]:
    info = graph.module_info
    outvars = [v for v in info.jaxpr.outvars[: info.num_var_out] if not isinstance(v, Literal)]
    for source in sorted({s for v in outvars for s in sources.get(v, ())}, key=str):
        yield f"{_node(graph, source)} {CURRENT if source[0] == 'y' else '-->'} out"
