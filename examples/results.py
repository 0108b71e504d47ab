"""Run the examples on several seeds, and tabulate what they print.

    python examples/results.py --jobs 2 --seeds 3                    # all; what is in results.jsonl is not run again
    python examples/results.py --tasks digits,copying --rules d_rtrl,bptt --budget 600
    python examples/results.py --read results.jsonl                  # runs nothing

Each run is a process of its own with one thread, the short ones first. Its line of JSON is added to the file as soon as
it is there. The tables go to docs/results_tables.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm
from training import RULES

ROOT = Path(__file__).parent.parent
STREAMING = RULES[:-1]
ALL_OPTIMIZERS = ("adam", "sgd", "rmsprop")

# (minutes that a run takes on one core, about; script and options; rules; optimisers)
GRID = [
    (0.3, "reward_modulated.py", ("three_factor", *RULES), ("adam",)),
    (0.5, "sequential_digits.py --cell lru", RULES, ALL_OPTIMIZERS),
    (0.5, "sequential_digits.py --cell gru", RULES, ALL_OPTIMIZERS),
    (0.5, "sequential_digits.py --cell gru_after", RULES, ("adam",)),
    (0.5, "adding.py --cell gru --steps 50", RULES, ("adam",)),
    (0.5, "adding.py --cell lru --steps 200", RULES, ("adam",)),
    (0.5, "copying.py --steps 200", RULES, ("adam",)),
    (0.6, "evidence_accumulation.py", RULES, ("adam",)),
    *((0.6, f"streaming_rl.py --length 8 --cell {c}", STREAMING, ("adam",)) for c in ("lru", "rtu", "gru")),
    *((0.7, f"streaming_rl.py --length 32 --cell {c}", STREAMING, ("adam",)) for c in ("lru", "rtu", "gru")),
    *((1.2, f"streaming_rl.py --length 128 --cell {c}", STREAMING, ("adam",)) for c in ("lru", "rtu", "gru")),
    *((1.3, f"streaming_rl.py --task pole --cell {c}", STREAMING, ("adam",)) for c in ("lru", "rtu", "gru")),
    (1.5, "event_streams.py", RULES, ("adam",)),
    (1.6, "delayed_match_to_sample.py", RULES, ("adam",)),
    (1.8, "adding.py --cell lru --steps 1000", RULES, ("adam",)),
    (1.8, "copying.py --steps 1000", RULES, ("adam",)),
    (2.0, "sequential_digits.py --cell lru --size 28", RULES, ("adam",)),
    (0.5, "sequential_digits.py --cell gru --units 32", RULES, ("adam",)),
    (3.0, "sequential_digits.py --cell gru --units 32", ("snap",), ("adam",)),
    (9.0, "sequential_digits.py --cell gru_after", ("snap",), ("adam",)),
]

# Tasks by the beginning of their names, and what each tests.
SECTIONS = {
    "adding": "The sum of two marked numbers of a long sequence. Always saying 1 has a squared error of 0.167.",
    "copying": "Ten symbols out of eight, to be repeated after a delay. Guessing has an accuracy of 0.125.",
    "digits": "Handwritten digits, pixel by pixel: 8x8 pixels, or magnified to 28x28. Guessing has an accuracy of 0.1.",
    "delayed match-to-sample": (
        "Generalised integrate-and-fire neurons say whether two of eight directions, 1,000 steps apart, are the same. "
        "Guessing has an accuracy of 0.5."
    ),
    "evidence accumulation": (
        "Excitatory and inhibitory neurons with conductances, which follow Dale's law, count cues on two sides and "
        "decide after a delay. Guessing has an accuracy of 0.5."
    ),
    "event streams": (
        "Generated streams of events from 700 channels, 20 classes; three layers of 256 recurrent spiking neurons. "
        "Guessing has an accuracy of 0.05."
    ),
    "memory chain": (
        "Reinforcement learning from a stream, each step used once: the right one of two actions at the end of an "
        "episode was told at its beginning. Guessing has 0.5."
    ),
    "pole balancing": (
        "Reinforcement learning from a stream: a pole on a cart whose velocities are hidden; at most 500 steps."
    ),
    "reward-modulated": (
        "Spiking neurons that learn by a reward and their own noise, without the gradient of an error; four actions. "
        "The rules stand for their traces."
    ),
}


def commands(args):
    """What is to run, the cheapest first: command lines without the interpreter."""
    runs = [
        (minutes, seed, f"{script} --rule {rule} --optimizer {optimizer} --seed {seed}")
        for minutes, script, rules, optimizers in GRID
        for rule in rules
        for optimizer in optimizers
        for seed in range(args.seeds)
        if any(t in script for t in args.tasks.split(",")) and (not args.rules or rule in args.rules.split(","))
    ]
    return [command + " --quick" * args.quick for _, _, command in sorted(runs, key=lambda r: r[:2])]


def one_run(command, timeout):
    """The last line that a run prints, as a dictionary, or why there is none."""
    script, *options = command.split()
    threads = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": threads}
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / script, *options],
            env=os.environ | environment | {"PYTHONPATH": search},
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        return json.loads(done.stdout.splitlines()[-1]) | {"command": command}
    except subprocess.TimeoutExpired:
        return f"{command}: more than {timeout:.0f} s"
    except (IndexError, json.JSONDecodeError):
        return f"{command}: {done.stderr[-500:]}"


def run_all(args):
    before = {r["command"] for r in read(args.file)}
    todo, end = [c for c in commands(args) if c not in before], time.monotonic() + args.budget

    def within_budget(command):
        left = end - time.monotonic()
        return one_run(command, min(args.timeout, left)) if left > 0 else None

    with ThreadPoolExecutor(args.jobs) as pool, args.file.open("a") as file:
        waiting = as_completed([pool.submit(within_budget, c) for c in todo])
        for result in (w.result() for w in tqdm(waiting, total=len(todo), ncols=100)):
            if isinstance(result, dict):
                file.write(json.dumps(result) + "\n")
                file.flush()
            elif result:
                tqdm.write(result)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(runs):
    """Rows of Markdown: mean and standard deviation of the score over the seeds, time and memory."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["task"], run["rule"], run["optimizer"]].append(run)
    order = (*RULES[:-1], "snap", RULES[-1], "three_factor")
    measure = runs[0]["measure"]
    yield f"| task | rule | optimizer | {measure} | seeds | ms per update | temporary MiB |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for task, rule, optimizer in sorted(groups, key=lambda k: (natural(k[0]), k[2], order.index(k[1]))):
        group = groups[task, rule, optimizer]
        scores, seconds, memory = (
            np.array([r[name] for r in group]) for name in ("score", "seconds_per_update", "temporary_mib")
        )
        digits = 1 if scores.max() > 10 else 4 if measure == "squared error" else 3
        score = f"{scores.mean():.{digits}f}" + f" ± {scores.std():.{digits}f}" * (len(group) > 1)
        yield (
            f"| {task} | {rule} | {optimizer} | {score} | {len(group)} "
            f"| {1e3 * np.median(seconds):.3g} | {np.median(memory):.3g} |"
        )


def natural(name):
    """A key that sorts numbers in a name by their size."""
    return [part.zfill(6) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def page(runs):
    yield (
        "Written by `examples/results.py` from runs of the scripts in `examples/`: score on fresh or held-out trials "
        "(of a stream, its last tenth), mean ± standard deviation over seeds; the median time of an update, one thread "
        "per run, many runs side by side and not all on one machine, so that only its order of magnitude can be "
        "compared; and the temporary memory that XLA plans for an update. "
        "An update is one batch of trials, in a stream one step. How each task is made is told in its script."
    )
    for start, text in SECTIONS.items():
        chosen = [r for r in runs if r["task"].startswith(start)]
        if chosen:
            yield f"## {start[0].upper() + start[1:]}"
            yield text
            yield "\n".join(table(chosen))


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options.add_argument("--tasks", default="", help="parts of scripts' names and options, with commas; default: all")
    options.add_argument("--rules", default="", help="with commas; default: all")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--budget", type=float, default=float("inf"), help="seconds for all; nothing runs longer")
    options.add_argument("--timeout", type=float, default=900.0, help="seconds for one run")
    options.add_argument("--file", type=Path, default=Path("results.jsonl"), help="collects the lines of the runs")
    options.add_argument("--read", type=Path, help="run nothing, tabulate this file")
    options.add_argument("--quick", action="store_true", help="smoke runs")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "results_tables.md")
    args = options.parse_args()
    if not args.read:
        run_all(args)
    args.out.write_text("\n\n".join(page(read(args.read or args.file))) + "\n")


if __name__ == "__main__":
    main()
