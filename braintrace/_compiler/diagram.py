"""A compiled model as a diagram: what is traced, what gets the current step only, what is cut."""

from __future__ import annotations

import html
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .._jax import Atom, Literal
from .._types import path_str
from .flow import Flow, analyse_flow
from .graph import ETraceGraph
from .operands import operand_program

__all__ = ["mermaid", "svg"]

PLAIN, TRACED, CURRENT, CUT = "plain", "traced", "current step", "cut"
Edge = tuple[str, str, str, str]
Source = tuple[str, Any]  # ('old', path), ('new', path), ('y', operation index) or ('in', None)
Sources = dict[Hashable, frozenset[Source]]


class Diagram(NamedTuple):
    """Nodes: name -> lines of text; edges: source, kind, target, and what it is called."""

    nodes: dict[str, tuple[str, ...]]
    edges: list[Edge]


def diagram(graph: ETraceGraph) -> Diagram:
    """Operations, hidden groups, input and output, and how credit passes between them."""
    flow = analyse_flow(graph.module_info)
    sources = _direct_sources(graph, flow)
    nodes: dict[str, tuple[str, ...]] = {"x": ("input",)}
    for op in flow.ops:
        paths = dict.fromkeys(map(path_str, operand_program(graph.module_info, flow, op).paths.values()))
        nodes[f"op{op.index}"] = (*(paths or ["constant"]), op.title)
    for g in graph.hidden_groups:
        members = ", ".join(map(path_str, g.hidden_paths))
        nodes[f"g{g.index}"] = (members, f"shape {g.varshape}, S = {g.num_state}")
    nodes["out"] = ("output",)
    edges = (*_into_operations(graph, flow, sources), *_into_groups(graph, sources), *_out(graph, sources))
    return Diagram(nodes, list(dict.fromkeys(edges)))


def mermaid(graph: ETraceGraph) -> str:
    """The diagram in the language of Mermaid."""
    nodes, edges = diagram(graph)
    shapes = {"x": "([{}])", "out": "([{}])", "o": '["{}"]', "g": '[("{}")]'}
    lines = ["flowchart LR"]
    for name, text in nodes.items():
        shape = shapes.get(name) or shapes[name[0]]
        lines.append(f"  {name}{shape.format('<br/>'.join(text).replace(chr(34), '#quot;'))}")
    arrows = {PLAIN: "-->", TRACED: "==>", CURRENT: "-.->", CUT: "--x"}
    lines += [f"  {a} {arrows[kind]}{f'|{label}|' if label else ''} {b}" for a, kind, b, label in edges]
    return "\n".join(lines)


def svg(graph: ETraceGraph) -> str:
    """The diagram as a picture that needs nothing else; empty for one too large to be read."""
    nodes, edges = diagram(graph)
    if len(nodes) > 40:
        return ""
    column = _columns(nodes, edges)
    rows = _rows(column)
    half = {n: 5 + 3.4 * max(map(len, text)) for n, text in nodes.items()}
    widths = [2 * max(half[n] for n in nodes if column[n] == c) for c in range(max(column.values()) + 1)]
    place = {n: (sum(widths[:c]) + 80 * c + widths[c] / 2 + 10, 40 + 70 * rows[n]) for n, c in column.items()}
    width, height = sum(widths) + 80 * len(widths), 90 + 70 * max(rows.values())
    parts = [_line(place, half, *edge) for edge in edges]
    for name, text in nodes.items():
        (x, y), h = place[name], 10 + 7 * len(text)
        round_ = 4 if name.startswith("op") else 14
        parts.append(
            f'<rect x="{x - half[name]:.0f}" y="{y - h / 2:.0f}" width="{2 * half[name]:.0f}" height="{h}" '
            f'rx="{round_}" fill="#fff" stroke="#555"/>'
        )
        for i, words in enumerate(text):
            at = y + 3 + 12 * (i - (len(text) - 1) / 2)
            parts.append(f'<text x="{x:.0f}" y="{at:.0f}" text-anchor="middle">{html.escape(words)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>'
    )


def _columns(nodes: Mapping[str, object], edges: Sequence[Edge]) -> dict[str, int]:
    """Columns from left to right: a node is right of those that it follows in the order of the step."""
    order: dict[str, float] = {"x": -1, "out": len(edges) + len(nodes)}
    order |= {n: i for i, n in enumerate(n for n in nodes if n.startswith("op"))}
    for a, kind, b, _ in edges:  # a group comes after the last operation that drives it
        if b.startswith("g") and a.startswith("op"):
            order[b] = max(order.get(b, -1), order[a] + 0.5)
    column: dict[str, int] = {}
    for n in sorted(nodes, key=lambda n: order.get(n, 0)):
        before = [column[a] for a, _, b, _ in edges if b == n and a in column and a != n]
        column[n] = 1 + max(before, default=-1)
    column["out"] = max(column.values()) + int(list(column.values()).count(max(column.values())) > 1)
    return column


def _rows(column: Mapping[str, int]) -> dict[str, int]:
    """Every operation in front of a group has a row of its own, so that no arrow passes behind another one."""
    rows, taken, last = {}, 0, None
    for n, c in sorted(column.items(), key=lambda item: (item[1], not item[0].startswith("op"))):
        if not n.startswith("op") and c != last:
            taken = 0
        rows[n], taken, last = taken, taken + 1, c
        if not n.startswith("op"):
            taken = taken if any(m != n and d == c for m, d in column.items()) else 0
    return rows


def _line(
    place: Mapping[str, tuple[float, float]], half: Mapping[str, float], a: str, kind: str, b: str, label: str
) -> str:
    style = {
        PLAIN: 'stroke="#999"',
        TRACED: 'stroke="#1766b0" stroke-width="2.5"',
        CURRENT: 'stroke="#777" stroke-dasharray="2 3"',
        CUT: 'stroke="#c22" stroke-dasharray="6 3"',
    }[kind]
    (x, y), (to_x, to_y) = place[a], place[b]
    x, to_x = x + half[a], to_x - half[b]
    if to_x > x:
        bend = (to_x - x) / 2
        path, middle = f"M{x:.0f} {y}C{x + bend:.0f} {y} {to_x - bend:.0f} {to_y} {to_x:.0f} {to_y}", (y + to_y) / 2 - 4
    else:  # back in the order of the step: above
        top = min(y, to_y) - 38
        path, middle = f"M{x:.0f} {y}C{x + 30:.0f} {top} {to_x - 30:.0f} {top} {to_x:.0f} {to_y}", top + 12
    text = f'<text x="{(x + to_x) / 2:.0f}" y="{middle:.0f}" text-anchor="middle" fill="#777">{label}</text>'
    return f'<path d="{path}" fill="none" {style}/>' + text * bool(label)


def _direct_sources(graph: ETraceGraph, flow: Flow) -> Sources:
    """Per variable, what it depends on without passing a hidden value or an operation; key ``('into', path)``: what a
    new hidden value is computed from."""
    info = graph.module_info
    of: Sources = {v: frozenset([("in", None)]) for v in info.jaxpr.invars}
    of |= {v: frozenset[Source]() for v in info.invar_to_weight_path}
    of |= {v: frozenset([("old", p)]) for p, v in info.hidden_path_to_invar.items()}
    op_at = {op.position: op for op in flow.ops}

    def read(variables: Sequence[Atom]) -> frozenset[Source]:
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


def _edge(a: str, kind: str, b: str, label: str | None = None) -> Edge:
    return a, kind, b, ("" if kind == PLAIN else kind) if label is None else label


def _into_operations(graph: ETraceGraph, flow: Flow, sources: Sources) -> Iterator[Edge]:
    for op in flow.ops:
        for source in sorted(sources["op", op.index], key=str):
            kind = {"in": PLAIN, "old": CUT}.get(source[0], CURRENT)
            yield _edge(_node(graph, source), kind, f"op{op.index}")


def _into_groups(graph: ETraceGraph, sources: Sources) -> Iterator[Edge]:
    traced = {(r.op_index, g.index) for r in graph.hidden_param_op_relations for g in r.hidden_groups}
    for g in graph.hidden_groups:
        own = f"g{g.index}"
        if any(entry.kind != "zero" for row in g.jacobian.D for entry in row):
            yield _edge(own, TRACED, own, "D")
        for source in sorted({s for p in g.hidden_paths for s in sources["into", p]}, key=str):
            node, (kind, what) = _node(graph, source), source
            if kind == "y":
                yield _edge(node, TRACED if (what, g.index) in traced else CURRENT, own)
            elif kind == "in":
                yield _edge(node, PLAIN, own)
            elif node != own:
                yield _edge(node, CUT if kind == "old" else CURRENT, own)


def _out(graph: ETraceGraph, sources: Sources) -> Iterator[Edge]:
    info = graph.module_info
    outvars = [v for v in info.jaxpr.outvars[: info.num_var_out] if not isinstance(v, Literal)]
    for source in sorted({s for v in outvars for s in sources.get(v, ())}, key=str):
        yield _edge(_node(graph, source), CURRENT if source[0] == "y" else PLAIN, "out")
