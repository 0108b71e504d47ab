"""Sphinx configuration: `./scripts/docs` builds the site into docs/_build/html."""

import inspect
import re

import braintrace

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


def init_signature(app, what, name, obj, options, signature, return_annotation):
    """Modules and states are made by metaclasses that hide the signature of their constructor."""
    if what != "class" or obj.__init__ is object.__init__ or issubclass(obj, tuple):
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain)), return_annotation


def number_references(app, what, name, obj, options, lines):
    """Footnotes of many docstrings on one page would share their names: make lists of them."""
    lines[:] = [re.sub(r"^\.\. \[(\d+)\] ", r"\1. ", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", number_references)
    app.connect("autodoc-process-signature", init_signature)
