"""The benchmark command runs, on a size that takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPT = FOLDER / "compare.py"
OPTIONS = ["--skip-published", "--rounds", "1", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def compare(*options):
    command = [sys.executable, SCRIPT, *OPTIONS, *options]
    return subprocess.run(command, capture_output=True, text=True)


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "pp_prop |" in line]


def test_tables(tmp_path):
    page, wide = tmp_path / "page.md", tmp_path / "wide.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of the results -->\nafter\n")
    patterns = "lif/tiny/batched/pp_prop/sequence,lif/tiny/batched/pp_prop/memory"
    done = compare("--only", patterns, "--memory-steps", "320,640", "--output", page, "--wide", wide)
    assert done.returncode == 0, done.stderr
    times, memory = rows(wide.read_text())
    assert times[:4] == ["lif", "tiny", "batched", "pp_prop"] and float(times[6]) > 0
    (short, unit), (long, same_unit) = (cell.split() for cell in memory[5:7])
    assert unit == same_unit and float(long) < 1.1 * float(short)  # the losses alone grow
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert all(1 < len(row) <= 6 for row in rows(text)) and len(rows(text)) == 3  # time, memory, compile time


@pytest.mark.parametrize(
    "patterns",
    [
        ["ei/tiny/vmap/D_RTRL/late", "lif/tiny/batched/UORO/evolve"],
        pytest.param(
            ["gif/tiny/batched/hybrid/sequence", "conv/tiny/batched/D_RTRL-bf16/step"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["sparse/tiny/batched/OSTLRecurrent/sequence", "rnn/tiny/batched/SnAp-2/sequence"], marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_other_networks_rules_and_works(patterns, tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    done = compare("--one-process", "--only", ",".join(patterns), "--results", results)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    report = [sys.executable, FOLDER / "report.py", results, "--output", page]
    subprocess.run(report, check=True)
    model, _, _, rule, work = patterns[1].split("/")
    assert f"| {model} tiny | {rule} | {work} |" in page.read_text()


def test_patterns():
    from cases import EXTRAS, select

    assert len(select(["*"], ["S", "M"])) == 4 * 2 * 3 * (2 * 2 + 1) + len(EXTRAS)  # memory at S alone
    assert [str(case) for case in select(["gif/E/batched/SnAp*/late"], ["S"])] == ["gif/E/batched/SnAp-2/late"]


def test_pictures(tmp_path):
    command = [sys.executable, FOLDER / "plots.py", "--quick", "--repeats", "1", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"benchmarks_steps.svg", "benchmarks_units.svg"}


def test_a_failure_is_a_row(tmp_path):
    wide = tmp_path / "wide.md"
    done = compare("--only", "lif/tiny/batched/pp_prop/step", "--time-limit", "0.01", "--wide", wide)
    assert done.returncode == 0, done.stderr
    (row,) = rows(wide.read_text())
    assert "failed" in row and "this: no result within 0.01 s" in row[-1]
    assert "- this: no result within 0.01 s (lif tiny pp_prop)" in done.stdout


def test_an_unknown_part_names_the_choices():
    done = compare("--only", "lif/tiny/batched/rtrl")
    assert done.returncode and "'rtrl' is no rule" in done.stderr and "D_RTRL" in done.stderr


def test_a_cut_sequence_counts_in_full():
    import report
    from cases import Case

    def results(steps, *rounds):
        return [{"steps": steps, "times": times, "memory": 1500, "compile": 1.0} for times in rounds]

    found = {"plain": results(200, [0.2, 0.1], [0.4, 0.3]), "this": results(20, [0.02, 0.03], [0.09, 0.09])}
    found["snntorch"] = [{"steps": 200, "times": [1.0]}]  # another library: no memory, no compiling
    cases = {Case("lif", "S", "vmap", "pp_prop", "sequence"): found}
    ((*_, plain, this, _, ratio, rival, memory, _, _, _, _, _, notes),) = rows(report.time_table(cases))
    assert (plain, this, memory) == ("100 (250)", "200 (600)", "1.5 kB")
    assert (ratio, rival) == ("2.50", "10")  # the median of 0.2 / 0.1 and 0.9 / 0.3
    assert "20 of 200 steps ran" in notes
    short = report.short_table(cases, ["network", "rule", "time", "time / plain"])
    assert "| lif S | BPTT in snntorch | 1 s | 10 |" in short
