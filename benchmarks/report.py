"""From the workers' results to Markdown: a short page for people, and wide tables with all that was measured.

python benchmarks/report.py results.jsonl --output docs/benchmarks.md --wide benchmarks/results/cpu.md
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

from cases import SIZES, Case

THIS, PUBLISHED, BASELINE = "this", "published", "plain"
PACKAGES = ["jax", "jaxlib", "brainstate", "brainunit", "brainpy", "numpy"]

# What a page is written between, where it has both.
BEGIN, END = "<!-- results -->\n", "<!-- end of the results -->\n"

TITLES = {
    "sequence": "Gradient of a whole sequence",
    "step": "One online step",
    "evolve": "A sequence without a loss",
    "late": "A sequence with a late loss",
    "memory": "Temporary memory against the length of the sequence",
}
TEXTS = {
    "sequence": "The states are reset, then the network runs over the sequence with a loss at every step. *Plain* is "
    "back-propagation through time (BPTT), always over a batch.",
    "step": "The step of the network, its gradient and one step of gradient descent. *Plain* is the same without a "
    "learner: the gradient through one step.",
    "evolve": "`etrace_evolve`, from reset states. *Plain* is the network alone.",
    "late": "`etrace_evolve`, then `etrace_grad` of the last 40 steps. *Plain* is back-propagation through all steps, "
    "with a loss at the last 40.",
    "memory": "Of the compiled gradient of a whole sequence; nothing runs. *Plain* is back-propagation through time.",
}
READING = (
    "Times are in milliseconds: the fastest run of all rounds and, in parentheses, the median run. A ratio is to "
    "*plain*: that of the fastest runs of two processes that ran one after the other, the median over the rounds. "
    "*Memory* is what XLA plans for temporary arrays; *compile* is the seconds to trace and compile."
)
SHORT = (
    "Rows are of one network over a batch; `vmap` is in the wide tables. Times are those of the fastest run; *memory* "
    "is what XLA plans for temporary arrays."
)


def setting(root):
    """Machine and versions, as far as they can change a number."""
    sources = ["--", "braintrace", "benchmarks"]
    revision = git(root, "log", "-1", "--format=%h", *sources)
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
        "revision": revision or "unknown",
        "modified": not revision or bool(git(root, "status", "--porcelain", *sources)),
    }


def git(root, *command):
    try:
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def processor():
    info = Path("/proc/cpuinfo")
    found = info.exists() and re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or "unknown"


def every_result(finished):
    return [r for results in finished.values() for rs in results.values() for r in successes(rs)]


def fastest(result, full):
    """Seconds of the fastest run, at the full length when the sequence had to be cut."""
    return min(result["times"]) * full / result["steps"]


def successes(results):
    return [result for result in results if "error" not in result]


def ratio(results, baseline, full):
    """Median over the rounds in which both gave a time."""
    pairs = [(a, b) for a, b in zip(results, baseline) if "error" not in a and "error" not in b]
    return statistics.median(fastest(a, full) / fastest(b, full) for a, b in pairs) if pairs else None


def time_cell(results, full):
    good = successes(results)
    if not good:
        return "failed" if results else "–"
    middle = statistics.median(t * full / result["steps"] for result in good for t in result["times"])
    return f"{digits(1e3 * min(fastest(r, full) for r in good))} ({digits(1e3 * middle)})"


def cell(results, key, entry):
    good = [result for result in successes(results) if key in result]
    return entry(good[0][key]) if good else "–"


def seconds(value):
    return f"{digits(value)} s" if value >= 1 else f"{digits(1e3 * value)} ms"


def digits(value):
    """Three digits or more, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def amount(size):
    for unit in ["B", "kB", "MB"]:
        if size < 1000:
            return f"{digits(size)} {unit}"
        size /= 1000
    return f"{digits(size)} GB"


def ratio_cell(results, baseline, full):
    value = ratio(results, baseline, full)
    return "–" if value is None else f"{value:.2f}" if value < 10 else digits(value)


def failures(results, full):
    """Why a row lacks numbers, or has scaled ones."""
    for name, rs in results.items():
        yield from (f"{name}: {r['error']}" for r in rs if "error" in r)
        for steps in sorted({r.get("steps", full) for r in successes(rs)} - {full}):
            yield f"{name}: {steps} of {full} steps ran, the time is scaled, the memory is not"


def effort(results):
    """Who ran fewer times than others."""
    rounds = max(len(rs) for rs in results.values())
    most = max((len(r["times"]) for rs in results.values() for r in successes(rs)), default=0)
    for name, rs in results.items():
        if len(rs) < rounds and successes(rs):
            yield f"{name}: {len(rs)} of {rounds} rounds"
        fewest = min((len(r["times"]) for r in successes(rs)), default=most)
        if fewest < most:
            yield f"{name}: {fewest} of {most} runs in a round"


def row(cells):
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def table(head, rows):
    return "\n".join([row(head), row(["---"] * len(head)), *map(row, rows)])


def time_table(cases):
    """One row a case; the columns of a kind stand side by side for all contestants."""
    names = list(dict.fromkeys(name for results in cases.values() for name in results))
    others = [name for name in names if name != BASELINE]
    head = ["model", "size", "mode", "rule"]
    head += [f"time, {name}" for name in names] + [f"ratio, {name}" for name in others]
    head += [f"{kind}, {name}" for kind in ["memory", "compile"] for name in names] + ["notes"]
    rows = []
    for case, results in cases.items():
        # A step has no length that could be cut: its jobs carry that of the size.
        full, found = case.steps, {name: results.get(name, []) for name in names}
        cells = [case.model, case.size, case.mode, case.rule]
        cells += [time_cell(found[name], full) for name in names]
        cells += [ratio_cell(found[name], found[BASELINE], full) for name in others]
        cells += [cell(found[name], "memory", amount) for name in names]
        cells += [cell(found[name], "compile", "{:.1f}".format) for name in names]
        rows.append([*cells, "; ".join([*failures(results, full), *effort(results)])])
    return table(head, rows)


def memory_rows(cases):
    """Lengths, and labels with results: one for each contestant of a case; the plain network has one a model."""
    lengths = next((list(r["memory"]) for r in every_result(cases)), [])
    rows = {}
    for case, results in cases.items():
        for name, (result,) in results.items():
            labels = (case.model, case.size, *(("–", "–") if name == BASELINE else (case.mode, case.rule)), name)
            rows[labels] = result
    return lengths, rows


def memory_table(cases):
    lengths, found = memory_rows(cases)
    head = ["model", "size", "mode", "rule", "", *(f"T = {n}" for n in lengths), "notes"]
    return table(head, [[*labels, *amounts(r, lengths), r.get("error", "")] for labels, r in found.items()])


def amounts(result, lengths):
    memory = result.get("memory", {})
    return [amount(memory[n]) if n in memory else "–" for n in lengths]


def preface(setting, finished):
    """Machine, versions and sizes."""
    devices = {r["device"] for r in every_result(finished)}
    changed = " with changes" if setting["modified"] else ""
    published = f"; *published*: braintrace {setting['release']}" if PUBLISHED in setting["contestants"] else ""
    used = {case.size for case in finished}
    names = ["batch", "inputs", "units", "outputs", "steps"]
    return [
        f"- Processor: {setting['processor']}, {setting['cores']} cores; {setting['system']}",
        f"- Devices: {', '.join(sorted(devices)) or 'unknown'}",
        "- " + ", ".join(f"{name} {number}" for name, number in setting["versions"].items()),
        f"- *this*: braintrace at revision {setting['revision']}{changed}{published}",
        f"- Date: {date.today()}",
        "",
        table(["size", *names], [[size, *(SIZES[size][n] for n in names)] for size in SIZES if size in used]),
        "",
        "Rules: pp_prop and hybrid with decay 0.9, D_RTRL, EProp with kappa 0.5.",
        "",
    ]


def wide(setting, finished):
    """All that was measured."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/compare.py`.",
        "",
        *preface(setting, finished),
        READING,
        "",
    ]
    for work, title in TITLES.items():
        cases = {case: results for case, results in finished.items() if case.work == work}
        if cases:
            body = memory_table(cases) if work == "memory" else time_table(cases)
            lines += [f"## {title}", "", TEXTS[work], "", body, ""]
    return "\n".join(lines)


def short_row(case, results, who=THIS):
    """What the short tables pick their columns from."""
    own, plain, published = (results.get(name, []) for name in [who, BASELINE, PUBLISHED])
    good, base = successes(own), successes(plain)
    row = {
        "network": f"{case.model} {case.size}",
        "rule": case.rule if who == THIS else f"BPTT in {who}",
        "work": case.work,
        "time": seconds(min(fastest(r, case.steps) for r in good)) if good else "failed",
        "time / plain": ratio_cell(own, plain, case.steps),
        "published / plain": ratio_cell(published, plain, case.steps) if who == THIS else "–",
        "memory / plain": "–",
    }
    if good and base and "memory" in good[0]:
        row["memory / plain"] = f"{good[0]['memory'] / max(base[0]['memory'], 1):.2g}"
    compiling = {BASELINE: plain, THIS: results.get(THIS, []), PUBLISHED: published}
    return row | {name: cell(found, "compile", "{:.1f} s".format) for name, found in compiling.items()}


def short_table(cases, columns, plain="BPTT", rivals=True):
    """Some columns of the cases, without those that say nothing; below it what must be known of single rows."""
    rows, remarks = [], {}
    for case, results in cases.items():
        others = [name for name in results if rivals and name not in (BASELINE, THIS, PUBLISHED)]
        rows += [short_row(case, results, who) for who in [THIS, *others]]
        for text in failures(results, case.steps) if "time" in columns else ():
            remarks.setdefault(text.split(". ")[0], {})[f"{case.model} {case.size} {case.rule}"] = None
    columns = [column for column in columns if any(row[column] != "–" for row in rows)]
    notes = [f"- {text} ({', '.join(which)})" for text, which in remarks.items()]
    head = [column.replace(BASELINE, plain) for column in columns]
    return "\n".join([table(head, [[row[column] for column in columns] for row in rows]), "", *notes]).rstrip()


def short_memory(cases):
    lengths, found = memory_rows(cases)
    rows = []
    for (model, size, _, rule, name), result in found.items():
        who = {BASELINE: "BPTT", THIS: rule}.get(name, f"{rule}, {name}")
        rows.append([f"{model} {size}", who, *amounts(result, lengths)])
    return table(["network", "rule", *(f"T = {n}" for n in lengths)], rows)


def page(setting, finished):
    """One short table for each question."""
    batched = {case: results for case, results in finished.items() if case.mode == "batched"}

    def of(work):
        return {case: results for case, results in batched.items() if case.core and case.work == work}

    others = {case: results for case, results in batched.items() if not case.core and case.work != "memory"}
    times = ["time", "time / plain", "published / plain"]
    works = f"`sequence` as above. `evolve`: {TEXTS['evolve']} `late`: {TEXTS['late']}"
    questions = [
        ("How fast is the gradient of a sequence?", TEXTS["sequence"], of("sequence"),
         lambda cases: short_table(cases, ["network", "rule", *times, "memory / plain"])),
        ("How fast is one online step?", TEXTS["step"], of("step"),
         lambda cases: short_table(cases, ["network", "rule", *times], BASELINE)),
        ("How does memory grow with the sequence?", TEXTS["memory"], of("memory"), short_memory),
        ("How long does compiling take?", "To trace and compile the gradient of a sequence.", of("sequence"),
         lambda cases: short_table(cases, ["network", "rule", BASELINE, THIS, PUBLISHED], rivals=False)),
        ("Other workloads", works, others,
         lambda cases: short_table(cases, ["network", "rule", "work", *times], BASELINE)),
    ]  # fmt: skip
    lines = [*preface(setting, finished), SHORT, ""]
    for title, text, cases, body in questions:
        if cases:
            lines += [f"## {title}", "", text, "", body(cases), ""]
    return "\n".join(lines)


def write(setting, finished, page_file, wide_file):
    """The page between its marks, so that what people wrote around them stays, and the wide tables."""
    if wide_file:
        wide_file.write_text(wide(setting, finished))
    if page_file:
        before, begin, rest = (page_file.read_text() if page_file.exists() else "").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            before, begin, end, after = "# Benchmarks\n\n", BEGIN, END, ""
        page_file.write_text(f"{before}{begin}\n{page(setting, finished)}\n{end}{after}")


def read(path, setting=None):
    """The setting and the results of a file, by default those of its last line."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    setting = setting or records[-1]["setting"]
    return setting, {Case(**r["case"]): r["results"] for r in records if r["setting"] == setting}


def summary(case, results):
    """One line for the progress report."""
    parts = []
    for name, rs in results.items():
        if not successes(rs):
            parts.append(f"{name} failed ({rs[-1]['error']})")
        elif case.work == "memory":
            parts.append(f"{name} {' → '.join(amount(size) for size in rs[0]['memory'].values())}")
        else:
            parts.append(f"{name} {time_cell(rs, case.steps)} ms")
    return ", ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="file that compare.py wrote by --results")
    parser.add_argument("--output", type=Path, help="page to write, or to write into")
    parser.add_argument("--wide", type=Path, help="file for the tables with all that was measured")
    options = parser.parse_args()
    write(*read(options.results), options.output, options.wide)


if __name__ == "__main__":
    main()
