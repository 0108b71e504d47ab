"""The benchmark command runs, on a size that takes seconds."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "compare.py"
OPTIONS = ["--sizes", "tiny", "--skip-published", "--rounds", "1", "--repeats", "2"]


def compare(*options):
    command = [sys.executable, SCRIPT, *OPTIONS, *options]
    return subprocess.run(command, capture_output=True, text=True)


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "pp_prop |" in line]


def test_tables(tmp_path):
    page = tmp_path / "page.md"
    patterns = "lif/tiny/batched/pp_prop/sequence,lif/tiny/batched/pp_prop/memory"
    done = compare("--only", patterns, "--memory-steps", "320,640", "--output", page)
    assert done.returncode == 0, done.stderr
    times, memory = rows(page.read_text())
    assert times[:4] == ["lif", "tiny", "batched", "pp_prop"] and float(times[6]) > 0
    (short, unit), (long, same_unit) = (cell.split() for cell in memory[5:7])
    assert unit == same_unit and float(long) < 1.1 * float(short)  # the losses alone grow


def test_a_failure_is_a_row():
    done = compare("--only", "lif/tiny/batched/pp_prop/step", "--time-limit", "0.01")
    assert done.returncode == 0, done.stderr
    (row,) = rows(done.stdout)
    assert "failed" in row and "this: no result within 0.01 s" in row[-1]


def test_an_unknown_part_names_the_choices():
    done = compare("--only", "lif/tiny/batched/rtrl")
    assert done.returncode and "'rtrl' is no rule" in done.stderr and "D_RTRL" in done.stderr


def test_a_cut_sequence_counts_in_full(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import report

    def results(steps, *rounds):
        return [{"steps": steps, "times": times, "memory": 1500, "compile": 1.0} for times in rounds]

    case = namedtuple("Case", "model size mode rule")("lif", "S", "vmap", "pp_prop")
    found = {"plain": results(200, [0.2, 0.1], [0.4, 0.3]), "this": results(20, [0.02, 0.03], [0.09, 0.09])}
    ((*_, plain, this, ratio, memory, _, _, _, notes),) = rows(report.time_table({case: found}, {"S": {"steps": 200}}))
    assert (plain, this, memory) == ("100 (250)", "200 (600)", "1.5 kB")
    assert ratio == "2.50"  # the median of 0.2 / 0.1 and 0.9 / 0.3
    assert "20 of 200 steps ran" in notes
