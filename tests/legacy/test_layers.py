"""Layers that other packages provide, under the names that this one gave them."""

import sys

import pytest

import braintrace.nn as bnn

DEPRECATED = [name for name in dir(bnn) if name not in bnn.__all__]
BRAINPY = set("IF LIF ALIF Expon Alpha DualExpon STP STD".split())


def test_names():
    assert len(DEPRECATED) == 62 and BRAINPY < set(DEPRECATED)


@pytest.mark.parametrize("name", DEPRECATED)
def test_deprecated_names_warn_at_every_access(name):
    home = "brainpy.state" if name in BRAINPY else "brainstate.nn"
    module = pytest.importorskip(home)
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match=f"use {home}.{name}") as record:
            assert getattr(bnn, name) is getattr(module, name)
        assert record[0].filename == __file__


def test_deprecated_name_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "brainpy.state", None)
    hint = r"pip install 'brainpy>=2\.9'`, on Python 3\.11 with `pip install 'brainpy\.state<0\.2'"
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match=hint):
        bnn.LIF
