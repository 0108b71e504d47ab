"""Time and temporary memory of the gradient of a sequence, drawn against the steps and against the units of `lif`.

python benchmarks/plots.py
python benchmarks/plots.py --quick --folder /tmp
"""

import argparse
import functools
from pathlib import Path

import compare
import matplotlib.pyplot as plt
import report

LINES = {"BPTT": "o", "pp_prop": "s", "D_RTRL": "^"}
SIZE = dict(batch=4, inputs=100, units=128, outputs=10)
STEPS, UNITS = [50, 200, 800, 3200], [64, 128, 256, 512, 1024]


@functools.cache
def measure(rule, steps, units, repeats, limit):
    """Milliseconds of the fastest run and megabytes, in this process."""
    job = dict(model="lif", work="sequence", steps=steps, size=SIZE | {"units": units}, repeats=repeats, limit=limit)
    if rule != "BPTT":
        job |= dict(mode="batched", rule=rule)
    result = compare.run_worker(compare.Contestant("", learner=rule != "BPTT", here=True), job, limit)
    if "error" in result:
        raise RuntimeError(f"{rule}, {steps} steps, {units} units: {result['error']}")
    return 1e3 * min(result["times"]), result["memory"] / 1e6


def draw(path, label, values, points):
    """One panel for time and one for memory; `points` has both for each rule and value."""
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "benchmarks"}  # text as text, the same names every time
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, which, name in zip(axes, (0, 1), ("time (ms)", "temporary memory (MB)")):
        for rule, marker in LINES.items():
            axis.loglog(values, [point[which] for point in points[rule]], marker=marker, label=rule)
        axis.set(xlabel=label, ylabel=name)
        axis.set_xticks(values, values, minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one tiny size")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs, of which the fastest counts")
    parser.add_argument("--folder", type=Path, default=compare.ROOT / "docs", help="where the pictures go")
    options = parser.parse_args()
    steps, units, at = ([10], [8], (10, 8)) if options.quick else (STEPS, UNITS, (200, SIZE["units"]))
    for name, label, values, sizes in [
        ("steps", "steps T", steps, [(value, at[1]) for value in steps]),
        ("units", "units H", units, [(at[0], value) for value in units]),
    ]:
        points = {rule: [measure(rule, *size, options.repeats, 60.0) for size in sizes] for rule in LINES}
        draw(options.folder / f"benchmarks_{name}.svg", label, values, points)
        for rule, found in points.items():
            print(f"{name} {rule}: {', '.join(f'{time:.3g} ms {memory:.3g} MB' for time, memory in found)}", flush=True)
    setting = report.setting(compare.ROOT)
    print(f"{setting['processor']}, {setting['cores']} cores; jax {setting['versions']['jax']}; {setting['revision']}")


if __name__ == "__main__":
    main()
