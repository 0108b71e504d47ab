"""From the workers' results to Markdown."""

import os
import platform
import re
import statistics
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

THIS, PUBLISHED, BASELINE = "this", "published", "plain"
PACKAGES = ["jax", "jaxlib", "brainstate", "brainunit", "brainpy", "numpy"]

TITLES = {
    "sequence": "Gradient of a whole sequence",
    "step": "One online step",
    "memory": "Temporary memory against the length of the sequence",
}
TEXTS = {
    "sequence": "The states are reset, then the network runs over the sequence with a loss at every step. *Plain* is "
    "back-propagation through time, always over a batch.",
    "step": "The step of the network, its gradient and one step of gradient descent. *Plain* is the same without a "
    "learner: the gradient through one step.",
    "memory": "Of the compiled gradient of a whole sequence; nothing runs. *Plain* is back-propagation through time.",
}
READING = (
    "Times are in milliseconds: the fastest run of all rounds and, in parentheses, the median run. A ratio is to "
    "*plain*: that of the fastest runs of two processes that ran one after the other, the median over the rounds. "
    "*Memory* is what XLA plans for temporary arrays; *compile* is the seconds to trace and compile."
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
        return "failed"
    middle = statistics.median(t * full / result["steps"] for result in good for t in result["times"])
    return f"{digits(1e3 * min(fastest(r, full) for r in good))} ({digits(1e3 * middle)})"


def cell(results, entry):
    good = successes(results)
    return entry(good[0]) if good else "–"


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


def notes(results, full):
    """What a reader must know of a row: failures, cut sequences, fewer rounds."""
    rounds = max(len(rs) for rs in results.values())
    most = max((len(r["times"]) for rs in results.values() for r in successes(rs)), default=0)
    for name, rs in results.items():
        yield from (f"{name}: {r['error']}" for r in rs if "error" in r)
        for steps in sorted({r["steps"] for r in successes(rs)} - {full}):
            yield f"{name}: {steps} of {full} steps ran, the time is scaled, the memory is not"
        if len(rs) < rounds and successes(rs):
            yield f"{name}: {len(rs)} of {rounds} rounds"
        fewest = min((len(r["times"]) for r in successes(rs)), default=most)
        if fewest < most:
            yield f"{name}: {fewest} of {most} runs in a round"


def row(cells):
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def table(head, rows):
    return "\n".join([row(head), row(["---"] * len(head)), *map(row, rows)])


def time_table(cases, sizes):
    """One row a case; the columns of a kind stand side by side for all contestants."""
    names = list(next(iter(cases.values())))
    others = [name for name in names if name != BASELINE]
    head = ["model", "size", "mode", "rule"]
    head += [f"{kind}, {name}" for kind in ["time"] for name in names] + [f"ratio, {name}" for name in others]
    head += [f"{kind}, {name}" for kind in ["memory", "compile"] for name in names] + ["notes"]
    rows = []
    for case, results in cases.items():
        # A step has no length that could be cut: its jobs carry that of the size.
        full = sizes[case.size]["steps"]
        cells = [case.model, case.size, case.mode, case.rule]
        cells += [time_cell(results[name], full) for name in names]
        cells += [ratio_cell(results[name], results[BASELINE], full) for name in others]
        cells += [cell(results[name], lambda r: amount(r["memory"])) for name in names]
        cells += [cell(results[name], lambda r: f"{r['compile']:.1f}") for name in names]
        rows.append([*cells, "; ".join(notes(results, full))])
    return table(head, rows)


def memory_table(cases):
    """One row for each contestant of a case; the plain network, the same for every rule, has one a model."""
    lengths = next((list(r["memory"]) for r in every_result(cases)), [])
    rows = {}
    for case, results in cases.items():
        for name, (result,) in results.items():
            labels = (case.model, case.size, *(("–", "–") if name == BASELINE else (case.mode, case.rule)), name)
            found = result.get("memory", {})
            rows[labels] = [amount(found[n]) if n in found else "–" for n in lengths] + [result.get("error", "")]
    head = ["model", "size", "mode", "rule", "", *(f"T = {n}" for n in lengths), "notes"]
    return table(head, [[*labels, *cells] for labels, cells in rows.items()])


def document(setting, finished, sizes):
    devices = {r["device"] for r in every_result(finished)}
    changed = " with changes" if setting["modified"] else ""
    lines = ["# Benchmarks", "", "Written by `python benchmarks/compare.py`.", ""]
    lines += [
        f"- Processor: {setting['processor']}, {setting['cores']} cores; {setting['system']}",
        f"- Device of JAX: {', '.join(sorted(devices)) or 'unknown'}",
        "- " + ", ".join(f"{name} {number}" for name, number in setting["versions"].items()),
        f"- *this*: braintrace at revision {setting['revision']}{changed}; "
        f"*published*: braintrace {setting['release']}",
        f"- Date: {date.today()}",
        "",
    ]
    used = {case.size for case in finished}
    names = dict(batch="batch", inputs="inputs", units="units", outputs="outputs", steps="steps")
    lines += [table(["size", *names], [[s, *(sizes[s][n] for n in names)] for s in sizes if s in used]), ""]
    lines += ["Rules: pp_prop with decay 0.9, D_RTRL, EProp with kappa 0.5.", "", READING, ""]
    for work, title in TITLES.items():
        cases = {case: results for case, results in finished.items() if case.work == work}
        if cases:
            body = memory_table(cases) if work == "memory" else time_table(cases, sizes)
            lines += [f"## {title}", "", TEXTS[work], "", body, ""]
    return "\n".join(lines)


def summary(case, results, sizes):
    """One line for the progress report."""
    full = sizes[case.size]["steps"]
    parts = []
    for name, rs in results.items():
        if not successes(rs):
            parts.append(f"{name} failed ({rs[-1]['error']})")
        elif case.work == "memory":
            parts.append(f"{name} {' → '.join(amount(size) for size in rs[0]['memory'].values())}")
        else:
            parts.append(f"{name} {time_cell(rs, full)} ms")
    return ", ".join(parts)
