"""Sphinx configuration: `./scripts/docs` builds the site into docs/_build/html."""

import enum
import importlib.util
import re
import sys
import zlib
from pathlib import Path

from sphinx.errors import ExtensionError

import braintrace

sys.path.insert(0, str(Path(__file__).parent))
from links import inventories
from signatures import init_signature

project = "braintrace"
author = "the braintrace authors"
version = release = braintrace.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "links",
]
exclude_patterns = ["_build", "jupyter_execute", "results_tables.md"]  # the last is a part of results.md
default_role = "py:obj"  # of `names` in docstrings
intersphinx_mapping = inventories(Path(__file__).parent / "_build" / "inventories")
html_theme = "furo"
html_title = f"braintrace {version}"
html_css_files = ["site.css"]
# MathJax with its fonts is part of the site, which so needs no network; of this package only the files are used.
(mathjax,) = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
html_static_path = ["_static", f"{mathjax}/static"]
mathjax_path = "mathjax/tex-chtml.js"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks keep the outputs they are stored with; tests/test_notebooks.py runs their code

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name the types
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def set_signature(app, what, name, obj, options, signature, return_annotation):
    if what != "class":
        return None
    if issubclass(obj, enum.Enum):
        return "", None
    found = init_signature(obj)
    return None if found is None else (str(found), return_annotation)


def number_references(app, what, name, obj, options, lines):
    """Footnotes of many docstrings on one page would share their names: make lists of them."""
    lines[:] = [re.sub(r"^\.\. \[(\d+)\] ", r"\1. ", line) for line in lines]


def split_attributes(app, what, name, obj, options, lines):
    """Attributes that share a line of the docstring are one field each, as parameters are."""
    field = re.compile(r"^:(ivar|vartype) (\w+(?:, \w+)+):(.*(?:\n +.*)*)", flags=re.M)
    one_each = lambda m: "\n".join(f":{m[1]} {name}:{m[3]}" for name in m[2].split(", "))  # noqa: E731
    lines[:] = field.sub(one_each, "\n".join(lines)).split("\n")


def check_site(app, exception):
    """Every public name can be linked to and is in the inventory, and no page loads anything from a network."""
    if exception is not None or app.builder.name != "html":
        return
    site = Path(app.outdir)
    pages = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    styles = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.css")}
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    places = dict(re.findall(r"^(\S+) py:\w+ -?\d+ (\S+) ", inventory, flags=re.M))
    problems = []
    for name in (f"{module.__name__}.{name}" for module in (braintrace, braintrace.nn) for name in module.__all__):
        page, _, anchor = places.get(name, "").replace("$", name).partition("#")
        if f'id="{anchor}"' not in pages.get(page, ""):
            problems.append(f"{name} has no anchor in the reference (docs/api)")
    elsewhere = r"""["']?(?:https?:)?//[^>)]*"""
    loads = rf"<(?:script|link|img|iframe)\b[^>]*?\s(?:src|href)={elsewhere}|url\({elsewhere}"
    for page, text in (pages | styles).items():
        problems += [f"{page} needs a network: {load}" for load in re.findall(loads, text)]
    if problems:
        raise ExtensionError("\n".join(problems))


def setup(app):
    app.connect("autodoc-process-docstring", number_references)
    app.connect("autodoc-process-docstring", split_attributes)
    app.connect("autodoc-process-signature", set_signature)
    app.connect("build-finished", check_site)
