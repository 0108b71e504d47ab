"""Time and temporary memory of online gradients: this checkout, the published package and back-propagation.

python benchmarks/compare.py --output docs/benchmarks.md
python benchmarks/compare.py --only lif/S/*/pp_prop --skip-published
"""

import argparse
import functools
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import distributions, version
from pathlib import Path

import jax
import report
from report import BASELINE, PUBLISHED, THIS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "braintrace-benchmarks"

SIZES = {
    "tiny": dict(batch=2, inputs=5, units=8, outputs=3, steps=10),
    "S": dict(batch=32, inputs=100, units=256, outputs=10, steps=200),
    "M": dict(batch=64, inputs=700, units=512, outputs=20, steps=200),
    "L": dict(batch=256, inputs=1024, units=2048, outputs=20, steps=200),
}
FIELDS = {
    "model": ["lif", "alif", "gru", "lstm"],
    "size": list(SIZES),
    "mode": ["batched", "vmap"],
    "rule": ["pp_prop", "D_RTRL", "EProp"],
    "work": ["sequence", "step", "memory"],
}


@dataclass(frozen=True)
class Case:
    """What to compute; who computes it is a `Contestant`."""

    model: str
    size: str
    mode: str
    rule: str
    work: str

    def __str__(self):
        return "/".join(asdict(self).values())


@dataclass(frozen=True)
class Contestant:
    """An interpreter, what it finds before its own packages, and whether it runs a learner or the plain network."""

    python: str
    path: str = ""
    learner: bool = True
    here: bool = False  # in this process instead of one of its own


def matches(case, pattern):
    return all(fnmatchcase(value, glob) for value, glob in zip(asdict(case).values(), pattern.split("/")))


def select(sizes, patterns):
    """The cases that match a pattern, in order. Memory is measured for the first size alone."""
    for pattern in patterns:
        globs = pattern.split("/")
        for glob, (field, values) in zip(globs, FIELDS.items()):
            if not any(fnmatchcase(value, glob) for value in values):
                raise SystemExit(f"--only {pattern}: {glob!r} is no {field}; give one of {', '.join(values)}, or *")
        if len(globs) > len(FIELDS):
            raise SystemExit(f"--only {pattern}: more parts than {'/'.join(FIELDS)}")
    every = [Case(*values) for values in itertools.product(*(FIELDS | {"size": sizes}).values())]
    cases = [case for case in every if any(matches(case, p) for p in patterns)]
    cases = [case for case in cases if case.work != "memory" or case.size == sizes[0]]
    if not cases:
        raise SystemExit(f"No case of the sizes {', '.join(sizes)} matches --only {','.join(patterns)}; see --sizes")
    return cases


def run_worker(contestant, job, limit):
    """What one worker process prints, or the reason why it printed nothing."""
    if contestant.here:
        import worker

        result = worker.result_of(job | {"learner": contestant.learner}, time.monotonic())
        jax.clear_caches()
        gc.collect()
        return result
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if contestant.path:
        environment["PYTHONPATH"] = contestant.path
    command = [contestant.python, HERE / "worker.py", json.dumps(job | {"learner": contestant.learner})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {limit:g} s", "timeout": True}
    if done.returncode or not done.stdout.strip():
        errors = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit status {done.returncode}: {errors[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def compile_only(contestant, job, limit):
    """`run_worker` for memory: the plain network is the same for every rule, and a compiler needs no second round."""
    return run_worker(contestant, json.loads(job), limit)


def timed_worker(contestant, job, limit):
    """`run_worker`, with ever shorter sequences until one fits the limit."""
    while True:
        result = run_worker(contestant, job, limit)
        if not result.get("timeout") or job["work"] != "sequence" or job["steps"] < 20:
            return result
        job = job | {"steps": job["steps"] // 10}


def measure(case, contestants, options):
    """All rounds of one case: name of a contestant to a list of results, one a round."""
    size = dict(SIZES[case.size])
    job = dict(model=case.model, work=case.work, steps=size.pop("steps"), size=size, repeats=options.repeats)
    job["limit"] = options.time_limit
    online = dict(mode=case.mode, rule=case.rule)
    if case.work == "memory":
        job["steps"] = options.memory_steps
        jobs = {name: json.dumps(job | online if c.learner else job) for name, c in contestants.items()}
        return {name: [compile_only(c, jobs[name], options.time_limit)] for name, c in contestants.items()}

    results = {name: [] for name in contestants}
    steps = dict.fromkeys(contestants, job["steps"])
    waiting = set(contestants)
    for _ in range(options.rounds):
        for name in [name for name in contestants if name in waiting]:
            contestant, start = contestants[name], time.monotonic()
            its_job = job | (online if contestant.learner else {}) | {"steps": steps[name]}
            result = timed_worker(contestant, its_job, options.time_limit)
            results[name].append(result)
            steps[name] = result.get("steps", steps[name])
            if "error" in result or time.monotonic() - start > options.time_limit / 2:
                waiting.discard(name)
    return results


def published_python(release, folder):
    """The interpreter of an environment with the published package beside the running JAX, made unless it is there."""
    folder = folder or CACHE / f"braintrace-{release}-jax-{version('jax')}"
    if ROOT in folder.resolve().parents:
        raise SystemExit(f"--published-env {folder} lies inside the repository; choose a folder outside of it")
    python = folder / "bin" / "python"
    wanted = f"{release} {version('jax')}"
    if not python.exists():
        print(f"Installing braintrace {release} in {folder}", flush=True)
        accelerator = re.compile(r"jax$|jaxlib$|jax[-_]cuda|jax[-_]rocm|nvidia[-_]")
        same = [f"{d.name}=={d.version}" for d in distributions() if accelerator.match(d.name)]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = [f"braintrace=={release}", "brainpy", "braintools", *same]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    ask = "from importlib.metadata import version as v; print(v('braintrace'), v('jax'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip()
    if found != wanted:
        raise SystemExit(
            f"{folder} holds braintrace and jax {found or '(not both)'}, not {wanted}: remove it or pass another "
            "--published-env"
        )
    return str(python)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    patterns = f"patterns {'/'.join(FIELDS)}, parts at the end may be left out"
    parser.add_argument("--only", default="*", help=patterns)
    parser.add_argument("--sizes", default="S,M", help=f"out of {', '.join(SIZES)}")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contestant of a case, in turns")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs in one process")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for one process")
    parser.add_argument("--memory-steps", default="200,800,3200", help="lengths in the memory table")
    parser.add_argument("--skip-published", action="store_true", help="leave the published package out")
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="all in this process, where starting them takes the time; no published",
    )
    parser.add_argument("--release", default="0.2.6", help="version of the published package")
    parser.add_argument("--published-env", type=Path, help="virtual environment of the published package")
    parser.add_argument("--output", type=Path, help="Markdown file to write; without it the tables are printed")
    parser.add_argument("--results", type=Path, help="file of raw results: read first, extended by each new case")
    options = parser.parse_args()
    options.sizes = options.sizes.split(",")
    if unknown := set(options.sizes) - set(SIZES):
        parser.error(f"--sizes: {', '.join(sorted(unknown))}: give names out of {', '.join(SIZES)}")
    if min(options.rounds, options.repeats) < 1:
        parser.error("--rounds and --repeats must be at least 1")
    options.memory_steps = [int(steps) for steps in options.memory_steps.split(",")]
    return options


def main():
    options = arguments()
    cases = select(options.sizes, options.only.split(","))
    contestants = {
        BASELINE: Contestant(sys.executable, str(ROOT), learner=False, here=options.one_process),
        THIS: Contestant(sys.executable, str(ROOT), here=options.one_process),
    }
    if not (options.skip_published or options.one_process):
        contestants[PUBLISHED] = Contestant(published_python(options.release, options.published_env))

    # Results of another machine, version, set of contestants or effort are no part of this comparison.
    setting = report.setting(ROOT) | {"contestants": list(contestants), "release": options.release}
    setting["effort"] = [options.rounds, options.repeats, options.time_limit, options.memory_steps]
    finished = {}
    if options.results and options.results.exists():
        for line in options.results.read_text().splitlines():
            record = json.loads(line)
            if record["setting"] == setting and not setting["modified"]:
                finished[Case(**record["case"])] = record["results"]

    for i, case in enumerate(cases, 1):
        if case not in finished:
            finished[case] = measure(case, contestants, options)
            if options.results:
                with options.results.open("a") as f:
                    record = {"setting": setting, "case": asdict(case), "results": finished[case]}
                    f.write(json.dumps(record) + "\n")
        print(f"[{i}/{len(cases)}] {case}: {report.summary(case, finished[case], SIZES)}", flush=True)
        if options.output:
            options.output.write_text(report.document(setting, finished, SIZES))
    if not options.output:
        print("\n" + report.document(setting, finished, SIZES))


if __name__ == "__main__":
    main()
