"""The examples run, on sizes that take seconds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
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
    "command, measure",
    [
        ("delayed_match_to_sample.py --rule pp_prop", "accuracy"),
        ("delayed_match_to_sample.py --rule d_rtrl", "accuracy"),
        ("evidence_accumulation.py --rule hybrid", "accuracy"),
        ("sequential_digits.py --rule d_rtrl --cell lru --optimizer rmsprop", "accuracy"),
        ("sequential_digits.py --rule immediate --cell gru --optimizer sgd", "accuracy"),
        ("sequential_digits.py --rule snap --cell gru --units 6", "accuracy"),
        ("adding.py --rule d_rtrl --memory", "squared error"),
        ("adding.py --rule bptt --cell lru --steps 20", "squared error"),
        ("copying.py --rule d_rtrl --steps 50", "accuracy"),
        ("streaming_rl.py --length 5 --cell rtu --rule d_rtrl", "right answers"),
        ("streaming_rl.py --task pole --cell gru --rule immediate", "steps balanced"),
        ("event_streams.py --rule pp_prop --neurons alif", "accuracy"),
        ("reward_modulated.py --rule three_factor", "accuracy"),
    ],
)
def test_task(command, measure, tmp_path):
    script, *options = command.split()
    lines = run(script, "--out", "picture.png", *options, folder=tmp_path).splitlines()
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    record = json.loads(lines[-1])
    assert record["measure"] == measure and record["rule"] == options[options.index("--rule") + 1]
    assert np.isfinite([record[k] for k in ("score", "seconds_per_update", "temporary_mib")]).all()
    assert len(lines) == 1 + 3 * ("--memory" in options)
    assert all(" MiB of temporary memory for " in line for line in lines[:-1])


def test_results(tmp_path):
    options = ["--tasks", "adding.py --cell lru --steps 200", "--rules", "d_rtrl", "--seeds", "2", "--jobs", "2"]
    options += ["--out", tmp_path / "results.md"]
    run("results.py", *options, folder=tmp_path)
    lines = (tmp_path / "results.jsonl").read_text()
    assert [json.loads(line)["task"] for line in lines.splitlines()] == ["adding, LRU, 200 steps"] * 2
    row = (tmp_path / "results.md").read_text().splitlines()[-1]
    assert row.startswith("| adding, LRU, 200 steps | d_rtrl | adam | ") and " | 2 | " in row
    run("results.py", *options, folder=tmp_path)  # runs nothing
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_depth(tmp_path):
    header, _, *rows = run("depth.py", folder=tmp_path).splitlines()
    assert header == "| cell | layers | updates before | layer | immediate | pp_prop | d_rtrl |"
    (lower, top) = ([float(x) for x in row.split("|")[5:8]] for row in rows)
    assert top[2] == 1.0 > lower[2] > 0.0  # of the top layer of linear recurrent units D_RTRL is exact
