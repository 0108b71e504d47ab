"""Every example in docstrings, README and docs runs."""

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
from pathlib import Path

import brainstate
import pytest

import braintrace

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(braintrace.__path__, "braintrace."))
init_signature = runpy.run_path(str(ROOT / "docs" / "signatures.py"))["init_signature"]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pages(page):
    namespace = {"__name__": "page"}  # one for the page: a tutorial goes on where it stopped
    try:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            exec(compile(block, str(page), "exec"), namespace)
    finally:
        brainstate.environ.pop("dt", None)  # a page may set the time step, as a script does


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^):#]+)[#)]", page.read_text())
    assert all((ROOT / target).exists() for target in targets)


@pytest.mark.parametrize("module", [braintrace, braintrace.nn], ids=lambda m: m.__name__)
def test_the_reference_has_every_public_name(module):
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(rf"^\.\. auto\w+:: {re.escape(module.__name__)}\.(\w+)$", text, flags=re.M))
    names = {name for name in module.__all__ if not name.startswith("__") and name != "nn"}
    assert names == documented


CELL = "w_init=Orthogonal(), b_init=ZeroInit(), state_init=ZeroInit(), activation='tanh', name=None"
ENGINE = "vjp_method='single-step', fast_solve=True, control_flow=None, config=None, random_feedback_key=None, **legacy"
SIGNATURES = [
    (braintrace.nn.GRUCell, f"(in_size, out_size, {CELL})"),
    (braintrace.nn.SparseLinear, "(spar_mat, b_init=None, in_size=None, name=None, param_type=ParamState)"),
    (
        braintrace.nn.LeakyRateReadout,
        "(in_size, out_size, tau=5.0 * u.ms, w_init=KaimingNormal(distribution='normal'), r_init=ZeroInit(), "
        "name=None)",
    ),
    (braintrace.pp_prop, f"(model, decay_or_rank=None, name=None, {ENGINE})"),
    (braintrace.KappaFilter, "(init_value, kappa)"),
    (braintrace.HiddenGroup, "None"),
]


@pytest.mark.parametrize("cls, expected", SIGNATURES, ids=lambda v: getattr(v, "__name__", ""))
def test_signatures_of_the_reference(cls, expected):
    assert str(init_signature(cls)) == expected


def test_signatures_show_no_representation_of_an_object():
    for module in (braintrace, braintrace.nn):
        for cls in filter(inspect.isclass, (getattr(module, name) for name in module.__all__)):
            assert re.fullmatch(r"None|\([\w=*,.'() -]*\)", str(init_signature(cls))), cls
