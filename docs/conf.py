"""Sphinx configuration: `./scripts/docs` builds the site into docs/_build/html."""

import enum
import re
import sys
from pathlib import Path

import braintrace

sys.path.insert(0, str(Path(__file__).parent))
from signatures import init_signature

project = "braintrace"
author = "the braintrace authors"
version = release = braintrace.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"braintrace {version}"

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


def setup(app):
    app.connect("autodoc-process-docstring", number_references)
    app.connect("autodoc-process-signature", set_signature)
