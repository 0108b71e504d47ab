"""The examples run, on sizes that take seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script, options", [("quickstart.py", ["--quick"]), ("whole_brain.py", ["--quick"])])
def test_example(script, options, tmp_path):
    picture = tmp_path / "picture.png"
    subprocess.run(
        [sys.executable, ROOT / "examples" / script, *options, "--out", picture],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert picture.stat().st_size > 10_000
