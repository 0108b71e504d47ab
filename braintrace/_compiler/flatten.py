"""The step as one flat program: evaluated again, with loops and branches opened where credit must be followed.

Run under ``jax.make_jaxpr``, so JAX makes the new variables. Calls are inlined; a relevant ``cond`` becomes every
branch and a selection, a relevant short ``scan`` its sub-steps one after the other, a long one with operations three
equations (:mod:`.descent`); all else is bound as it is.

Running every branch must not let a branch that was not taken (a division by zero, say) harm the gradient: a zero
cotangent times an infinite derivative is NaN. Therefore whatever enters a branch, and every output of an operation
inside, passes a *gate*, ``select(taken, v, stop_gradient(v))``: the same value, whose cotangent is an exact zero when
the branch is not taken, whatever arrives. The input of an operation is kept by the traces, so there non-finite entries
of a branch that was not taken become zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._jax import (
    ClosedJaxpr,
    JaxprEqn,
    at_source,
    bind_equation,
    call_body,
    is_jit,
    is_remat,
    is_tracer,
    open_jaxpr,
    prune,
    scan_operands,
    structs,
)
from .._program import Value, equations_within
from .._types import Path, path_str
from .constants import Constants, foldable
from .descent import Descent
from .diagnostics import CompilationRecord
from .forward_only import is_forward_only, with_reverse_rule
from .frame import Frame, Origin, finite, gate, is_marked, origin_of
from .labels import mixes
from .policy import ControlFlowPolicy
from .positions import dependence
from .remarks import Remarks, at, weights_of

__all__ = ["flatten"]

Outs = tuple[list[Value], list[Origin]]  # of an equation or a jaxpr: values of the outputs, and their origins


def flatten(
    closed: ClosedJaxpr, origins: Sequence[Origin], num_out: int, hidden_out: Sequence[bool], policy: ControlFlowPolicy
) -> tuple[ClosedJaxpr, list[CompilationRecord]]:
    """Flatten the step; the outputs from ``num_out`` on are new state leaves and keep the dtype of the old ones.

    ``origins`` tells what each input is, ``hidden_out`` which outputs are new hidden values.
    """
    jaxpr = open_jaxpr(closed)
    avals = structs(jaxpr.invars)
    first_state = len(jaxpr.invars) - (len(jaxpr.outvars) - num_out)
    flattener = _Flattener(policy)

    def step(*values: jax.Array) -> list[jax.Array]:
        results, _ = flattener.run(closed, values, origins, hidden_out)
        outs = [jnp.asarray(x) for x in results]
        for i, old in enumerate(values[first_state:], num_out):
            if outs[i].dtype != old.dtype:
                outs[i] = outs[i].astype(old.dtype)
        return outs

    flat = jax.make_jaxpr(step)(*avals)
    return prune(flat), flattener.remarks.records


class _Flattener:
    def __init__(self, policy: ControlFlowPolicy):
        self.policy = policy
        self.remarks = Remarks(policy)
        self.constants = Constants()

    def run(
        self,
        closed: ClosedJaxpr,
        values: Sequence[Value],
        origins: Sequence[Origin],
        hidden_out: Sequence[bool],
        taken: jax.Array | None = None,
        depth: int = 0,
    ) -> Outs:
        frame = Frame(closed, values, origins, hidden_out, taken, depth, self.constants)
        jaxpr = open_jaxpr(closed)
        for eqn in jaxpr.eqns:
            outs, out_origins = self.equation(eqn, frame)
            frame.env.update(zip(eqn.outvars, zip(outs, out_origins)))
        results = [frame.read(v) for v in jaxpr.outvars]
        return [v for v, _ in results], [o for _, o in results]

    def equation(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        known = [frame.waiting(v)[0] for v in eqn.invars]
        if not eqn.effects and foldable(eqn, known):
            return self.constants.outputs(eqn, known), [Origin()] * len(eqn.outvars)
        values, origins = frame.inputs(eqn)
        body = call_body(eqn) if is_jit(eqn) or is_remat(eqn) else None
        if body is not None and (is_jit(eqn) or self.is_relevant(eqn, frame)):
            return self.run(body, values, origins, frame.hidden_out(eqn), frame.taken, frame.depth)
        rule = {"cond": self.cond, "scan": self.scan, "while": self.while_loop}.get(eqn.primitive.name)
        if rule is not None and self.is_relevant(eqn, frame):
            return rule(eqn, frame)
        if rule is None:
            self.remarks.check_operations(eqn, frame)
        return self.whole(eqn, frame)

    def is_relevant(self, eqn: JaxprEqn, frame: Frame) -> bool:
        _, origins = frame.inputs(eqn)
        reads = any(o.live for o in origins)
        return reads or any(frame.hidden_out(eqn)) or any(map(is_marked, equations_within(eqn)))

    # -- one equation as it is ------------------------------------------------------------------------------------

    def whole(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        values, origins = frame.inputs(eqn)
        out_origins = [origin_of(eqn, origins, v) for v in eqn.outvars]
        if frame.taken is None:
            outs = with_reverse_rule(eqn)(*values) if is_forward_only(eqn) else bind_equation(eqn, values)
            return outs, out_origins
        with at_source(eqn):
            if is_marked(eqn):
                return self.operation_in_branch(eqn, frame, values), out_origins
            if not all(o.weights for o in out_origins):
                # Within a branch, parameters reach operations bare, so that they stay recognisable, all else gated.
                values = [frame.gate(v, gate) if o.weights else x for v, x, o in zip(eqn.invars, values, origins)]
            outs = with_reverse_rule(eqn)(*values) if is_forward_only(eqn) else bind_equation(eqn, values)
        return outs, out_origins

    def operation_in_branch(self, eqn: JaxprEqn, frame: Frame, values: list[Value]) -> list[Value]:
        i, y = eqn.primitive.x_index, eqn.primitive.y_index
        if i is not None:
            values[i] = frame.gate(eqn.invars[i], finite)
        outs = bind_equation(eqn, values)
        assert frame.taken is not None
        outs[y] = gate(frame.taken, outs[y])
        return outs

    # -- branches -------------------------------------------------------------------------------------------------

    def cond(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        (index, *operands), origins = frame.inputs(eqn)
        branches = eqn.params["branches"]
        if not is_tracer(index):
            chosen = branches[min(max(int(index), 0), len(branches) - 1)]
            return self.run(chosen, operands, origins[1:], frame.hidden_out(eqn), frame.taken, frame.depth)
        why = self.remarks.cannot_convert(eqn)
        if why is None:
            return self.every_branch(eqn, frame, index, operands, origins)
        if self.policy.cond == "convert":
            text = f"The branch{at(eqn)} is kept as it is: {why}."
            self.remarks.note("COND_CONVERSION_SKIPPED", "WARNING", eqn, text)
        knob = "ControlFlowPolicy(cond='convert')" if self.policy.cond == "opaque" else "jnp.where"
        self.remarks.check_weights(eqn, frame, "WEIGHT_IN_CONTROL_FLOW", f"Take it out of the branch, or use {knob}.")
        return self.kept(eqn, frame)

    def every_branch(
        self, eqn: JaxprEqn, frame: Frame, index: jax.Array, operands: Sequence[Value], origins: Sequence[Origin]
    ) -> Outs:
        self.remarks.enter(eqn, frame)
        branches = eqn.params["branches"]
        text = f"The branch{at(eqn)} runs both ways, and its result is selected."
        self.remarks.note("COND_IF_CONVERTED", "INFO", eqn, text)
        results = []
        for k, body in enumerate(branches):
            with at_source(eqn):
                taken = index == k if frame.taken is None else jnp.logical_and(frame.taken, index == k)
                inputs = [v if o.weights else gate(taken, v) for v, o in zip(operands, origins[1:])]
            hidden = frame.hidden_out(eqn)
            results.append(self.run(body, inputs, origins[1:], hidden, taken, frame.depth + 1))
        outs = []
        with at_source(eqn):
            for choices in zip(*(values for values, _ in results)):
                same = all(c is choices[0] for c in choices)
                outs.append(choices[0] if same else jax.lax.select_n(index, *map(jnp.asarray, choices)))
        joined = zip(eqn.outvars, zip(*(o for _, o in results)))
        return outs, [origin_of(eqn, [*os, origins[0]], v) for v, os in joined]

    # -- loops ----------------------------------------------------------------------------------------------------

    def scan(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        length, limit = eqn.params["length"], self.policy.scan_unroll_limit
        _, origins = frame.inputs(eqn)
        consts, carry = scan_operands(eqn)
        sliced = frozenset[Path]().union(*(o.weights for o in origins[consts + carry :]))
        if sliced:
            path = min(sliced, key=path_str)
            text = f"The scan{at(eqn)} takes one slice of the parameter {path_str(path)!r} in every sub-step"
            self.remarks.note("RELATION_EXCLUDED_SLICED_WEIGHT", "WARNING", eqn, f"{text}.", path)
            self.remarks.refuse(
                "WEIGHT_IN_CONTROL_FLOW",
                eqn,
                f"{text}, where no trace can follow it. Write the loop in Python with one parameter per sub-step.",
                path,
            )
        has_while = any(e.primitive.name == "while" for e in equations_within(eqn))
        blocked = "it has side effects" if eqn.effects else "it holds a while loop" if has_while else None
        if blocked is None and 1 <= length <= limit:
            self.remarks.note("SCAN_UNROLLED", "INFO", eqn, f"The scan{at(eqn)} of length {length} is unrolled.")
            return self.unrolled(eqn, frame)
        if blocked is None and length == 0:
            return self.whole(eqn, frame)
        if blocked is None:
            return self.long_scan(eqn, frame)
        self.remarks.note("SCAN_UNROLL_SKIPPED", "WARNING", eqn, f"The scan{at(eqn)} is kept as it is: {blocked}.")
        self.remarks.check_weights(eqn, frame, "WEIGHT_IN_CONTROL_FLOW", "Take it out of the loop.")
        return self.kept(eqn, frame)

    def long_scan(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        length, limit = eqn.params["length"], self.policy.scan_unroll_limit
        auto = self.policy.scan_descent == "auto"
        remedy = f"Pass ControlFlowPolicy(scan_unroll_limit={length}) to unroll it."
        self.remarks.note(
            "SCAN_UNROLL_SKIPPED",
            "INFO" if auto else "WARNING",
            eqn,
            f"The scan{at(eqn)} of length {length} is not unrolled: scan_unroll_limit={limit}.",
        )
        weights = weights_of(eqn, frame)
        if not auto:
            self.remarks.check_weights(eqn, frame, "WEIGHT_IN_CONTROL_FLOW", remedy)
        elif weights and any(map(is_marked, equations_within(eqn))):
            why = self.remarks.cannot_descend(eqn, frame)
            if why is None:
                descent = self.descent(eqn, frame)
                why = descent.obstacle()
                if why is None:
                    text = f"The scan{at(eqn)} of length {length} is followed in place."
                    self.remarks.note("SCAN_DESCENT_APPLIED", "INFO", eqn, text)
                    return self.in_place(eqn, frame, descent)
            text = f"The scan{at(eqn)} cannot be followed: {why}."
            self.remarks.note("SCAN_DESCENT_SKIPPED", "WARNING", eqn, text)
            self.remarks.check_weights(eqn, frame, "WEIGHT_IN_CONTROL_FLOW", f"{why[0].upper()}{why[1:]}. {remedy}")
        elif weights:
            path = min(weights, key=path_str)
            text = (
                f"The scan{at(eqn)} reads the parameter {path_str(path)!r} without a marked operation: it gets the "
                "exact gradient of the current step, without history."
            )
            self.remarks.note("SCAN_DESCENT_NO_RELATIONS", "WARNING", eqn, text, path)
        return self.kept(eqn, frame)

    def descent(self, eqn: JaxprEqn, frame: Frame) -> Descent:
        self.remarks.enter(eqn, frame)
        _, origins = frame.inputs(eqn)
        body, hidden = eqn.params["jaxpr"], frame.hidden_out(eqn)

        def run(*values: jax.Array) -> list[Value]:
            return self.run(body, values, origins, hidden, None, frame.depth + 1)[0]

        opened = jax.make_jaxpr(run)(*structs(open_jaxpr(body).invars))
        return Descent(eqn, opened, [o.live for o in origins], [bool(o.weights) for o in origins])

    def in_place(self, eqn: JaxprEqn, frame: Frame, descent: Descent) -> Outs:
        if eqn.params["length"] == 1:
            return self.unrolled(eqn, frame)
        values, origins = frame.inputs(eqn)
        every = [*origins, Origin(data=True, live=True)]
        return descent.outputs(values), [origin_of(eqn, every, v) for v in eqn.outvars]

    def unrolled(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        self.remarks.enter(eqn, frame)
        values, origins = frame.inputs(eqn)
        params = eqn.params
        n, carried = scan_operands(eqn)
        m = n + carried
        consts, carry, xs = values[:n], values[n:m], values[m:]
        const_origins, carry_origins, x_origins = (
            origins[:n],
            origins[n:m],
            [o._replace(entry=False) for o in origins[m:]],
        )
        hidden = frame.hidden_out(eqn)
        order = range(params["length"])
        stacked: list[list[Value]] = []
        joined: list[list[Origin]] = []
        for i in reversed(order) if params["reverse"] else order:
            with at_source(eqn):
                now = [_item(x, i) for x in xs]
            inputs, of_inputs = [*consts, *carry, *now], [*const_origins, *carry_origins, *x_origins]
            outs, out_origins = self.run(params["jaxpr"], inputs, of_inputs, hidden, frame.taken, frame.depth + 1)
            carry, carry_origins = outs[: m - n], out_origins[: m - n]
            stacked.append(outs[m - n :])
            joined.append(out_origins[m - n :])
        if params["reverse"]:
            stacked.reverse()
        with at_source(eqn):
            ys = [jnp.stack([jnp.asarray(y) for y in steps]) for steps in zip(*stacked)]
        y_origins = [origin_of(eqn, os, v) for v, os in zip(eqn.outvars[m - n :], zip(*joined))]
        return [*carry, *ys], [*carry_origins, *y_origins]

    def while_loop(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        self.remarks.check_weights(
            eqn,
            frame,
            "WEIGHT_IN_WHILE",
            "No policy can change that: use a loop of fixed length (brainstate.transform.for_loop or scan), or wrap "
            "the parameter in jax.lax.stop_gradient.",
        )
        return self.kept(eqn, frame)

    def kept(self, eqn: JaxprEqn, frame: Frame) -> Outs:
        """A relevant loop or branch that stays whole."""
        self.remarks.check_operations(eqn, frame)
        name, live = eqn.primitive.name, any(o.live for o in frame.inputs(eqn)[1])
        if not live:
            return self.whole(eqn, frame)
        if not is_forward_only(eqn):
            text = f"The {name}{at(eqn)} computes with hidden states and is kept as one operation."
            self.remarks.note("CONTROL_FLOW_OPAQUE_FWD", "INFO", eqn, text)
            return self.whole(eqn, frame)
        if self.policy.while_hidden == "error":
            self.remarks.refuse(
                "CONTROL_FLOW_OPAQUE_FWD",
                eqn,
                f"The {name}{at(eqn)} computes with hidden states or operations, and while_hidden='error' forbids it. "
                "Pass ControlFlowPolicy(while_hidden='opaque-fwd') to differentiate it in forward mode, or use a loop "
                "of fixed length (brainstate.transform.for_loop or scan).",
            )
        text = f"The {name}{at(eqn)} computes with hidden states: it is differentiated in forward mode."
        self.remarks.note("CONTROL_FLOW_OPAQUE_FWD", "INFO", eqn, text)
        lives = {i for i, o in enumerate(frame.inputs(eqn)[1]) if o.live}
        mixed = [
            mixes(of[i]) for v, of in zip(eqn.outvars, dependence(eqn)) if v in frame.used for i in lives & set(of)
        ]
        if any(mixed):
            text = (
                f"The {name}{at(eqn)} mixes positions, and has no reverse-mode derivative: what one position gives to "
                "another in it gets no credit. Use a loop of fixed length (brainstate.transform.for_loop or scan)."
            )
            self.remarks.note("CONTROL_FLOW_RECURRENT_MIXING", "WARNING", eqn, text)
        return self.whole(eqn, frame)


def _item(xs: Value, i: int) -> Value:
    return jax.lax.index_in_dim(xs, i, keepdims=False) if is_tracer(xs) else xs[i]
