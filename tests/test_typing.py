"""A user's script that is right passes `mypy --strict`; one with a misspelt option or mode does not."""

import os
import pathlib
import re

import pytest

import braintrace

PREAMBLE = """
import braintrace
import jax.numpy as jnp

model = braintrace.nn.GRUCell(2, 3)
x, xs = jnp.zeros((4, 2)), jnp.zeros((5, 4, 2))
"""
RIGHT = """
one = braintrace.compile(model, "d_rtrl", x, batch_size=4)
print(one.report, one.graph, one.param_states, one.hidden_states)
many = braintrace.compile(model, "hybrid", x, batch_size=4, vmap=True, decay_or_rank=0.9, exact="all")
print(many.report, many.graph, many.param_states, many.hidden_states, many.module)
grads = many.etrace_grad(xs, step_fn=lambda x: many(x).sum(), reduction="sum")
by_class = braintrace.pp_prop(model, decay_or_rank=(0.9, 19), vjp_method="multi-step", mode=None)
by_parameter = braintrace.pp_prop(model, {"Wh": 0.9, (): 19})
braintrace.EProp(model, feedback="random", random_feedback_key=0, trace_dtype=jnp.bfloat16)
braintrace.SnAp(model, n=2, control_flow=braintrace.ControlFlowPolicy())
"""
WRONG = """
braintrace.pp_prop(model, decay_or_rnk=0.9)
braintrace.pp_prop(model, 0.9, vjp_method="single")
braintrace.D_RTRL(model, trace_dtpe=None)
braintrace.EProp(model, feedback="randm")
braintrace.OSTLFeedforward(model, fast_slove=True)
braintrace.compile(model, "pp_prp", x)
braintrace.compile(model, "pp_prop", x, vmap=True, decay_or_rank=0.9)
braintrace.D_RTRL(model).etrace_grad(xs, reduction="men")
braintrace.D_RTRL(model).etrace_grad(xs, loss_output="per_steps")
"""


def test_scripts(tmp_path):
    api = pytest.importorskip("mypy.api")
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PREAMBLE + RIGHT)
    wrong.write_text(PREAMBLE + WRONG)
    home = str(pathlib.Path(braintrace.__file__).parents[1])
    before = os.environ.get("MYPYPATH")
    os.environ["MYPYPATH"] = home
    try:
        options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
        out, err, _ = api.run([*options, str(right), str(wrong)])
    finally:
        os.environ.pop("MYPYPATH") if before is None else os.environ.update(MYPYPATH=before)
    found = {(name, int(line)) for name, line in re.findall(r"(right|wrong)\.py:(\d+): error", out)}
    first = PREAMBLE.count("\n") + 2
    expected = {("wrong", first + i) for i in range(len(WRONG.strip().splitlines()))}
    assert found == expected, out + err
