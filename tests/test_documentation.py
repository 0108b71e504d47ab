"""Every example in docstrings, README and docs runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import brainstate
import pytest

import braintrace

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(braintrace.__path__, "braintrace."))
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


@pytest.mark.parametrize("module", [braintrace, braintrace.nn], ids=lambda m: m.__name__)
def test_the_reference_has_every_public_name(module):
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(rf"^\.\. auto\w+:: {re.escape(module.__name__)}\.(\w+)$", text, flags=re.M))
    names = {name for name in module.__all__ if not name.startswith("__") and name != "nn"}
    assert names == documented
