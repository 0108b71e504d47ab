"""The examples run, on sizes that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script, *options, folder):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / script, "--quick", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", ["quickstart.py", "whole_brain.py"])
def test_picture(script, tmp_path):
    picture = tmp_path / "picture.png"
    run(script, "--out", picture, folder=tmp_path)
    assert picture.stat().st_size > 10_000


def test_whole_brain_on_eight_devices_learns_the_same(tmp_path):
    reports = [
        run("whole_brain.py", "--out", tmp_path / "picture.png", *options, folder=tmp_path)
        for options in ((), ("--devices", "8"))
    ]
    of_all = [re.search(r"error on a new stimulus: ([\d.]+) Hz before, ([\d.]+) Hz after", r).groups() for r in reports]
    one, eight = ([float(x) for x in errors] for errors in of_all)
    assert one[1] < 0.9 * one[0]
    assert eight == pytest.approx(one, rel=0.02)
    crossing = re.search(r"bytes that cross per step: {'all-gather': '([\d,]+)', 'all-reduce': '([\d,]+)'}", reports[1])
    assert [int(n.replace(",", "")) for n in crossing.groups()] == [5 * 5000, 4 * 68]
    assert "MiB of arguments" in reports[1]


@pytest.mark.parametrize(
    "script, method, score",
    [
        ("delayed_match_to_sample.py", "pp_prop", "accuracy"),
        ("delayed_match_to_sample.py", "d_rtrl", "accuracy"),
        ("adding.py", "d_rtrl", "squared error"),
        ("adding.py", "bptt", "squared error"),
    ],
)
def test_task(script, method, score, tmp_path):
    report, memory = run(script, "--method", method, folder=tmp_path).splitlines()
    assert report.startswith(f"{method}, seed 0: {score} 0.")
    assert report.endswith(" s per update")
    assert " MiB of temporary memory for " in memory
