"""Time and temporary memory of online gradients: this checkout, the published package and back-propagation.

python benchmarks/compare.py --output docs/benchmarks.md
python benchmarks/compare.py --only lif/S/*/pp_prop --skip-published
"""

import argparse
import functools
import gc
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path

import jax
import report
from cases import CORE, SIZES, select
from report import BASELINE, PUBLISHED, THIS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "braintrace-benchmarks"

# Other libraries: what to install, and the cases that their worker, rival_NAME.py, knows.
SEQUENCES = "lif/*/batched/pp_prop/sequence"
RIVALS = {
    "snntorch": (["torch", "snntorch", "numpy"], SEQUENCES),
    "spyx": (["spyx", f"jax=={version('jax')}", f"jaxlib=={version('jaxlib')}"], SEQUENCES),
}


@dataclass(frozen=True)
class Contestant:
    """An interpreter, what it finds before its own packages, and whether it runs a learner or the plain network."""

    python: str
    path: str = ""
    learner: bool = True
    here: bool = False  # in this process instead of one of its own
    worker: str = "worker.py"
    cases: str = "*"


def run_worker(contestant, job, limit):
    """What one worker process prints, or the reason why it printed nothing."""
    if contestant.here:
        sys.path.insert(0, str(ROOT))  # before an installed package
        import worker

        result = worker.result_of(job | {"learner": contestant.learner}, time.monotonic())
        jax.clear_caches()
        gc.collect()
        return result
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if contestant.path:
        environment["PYTHONPATH"] = contestant.path
    command = [contestant.python, HERE / contestant.worker, json.dumps(job | {"learner": contestant.learner})]
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
        if not result.get("timeout") or job["work"] not in ("sequence", "evolve") or job["steps"] < 20:
            return result
        job = job | {"steps": job["steps"] // 10}


def measure(case, contestants, options):
    """All rounds of one case: name of a contestant to a list of results, one a round."""
    size = dict(SIZES[case.size])
    job = dict(model=case.model, work=case.work, steps=size.pop("steps"), size=size, repeats=options.repeats)
    job["limit"] = options.time_limit
    online = dict(mode=case.mode, rule=case.rule)
    contestants = {name: c for name, c in contestants.items() if case.matches(c.cases)}
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


def environment(folder, packages):
    """The interpreter of the virtual environment in a folder outside of this repository, made unless it is there."""
    if ROOT in folder.resolve().parents:
        raise SystemExit(f"{folder} lies inside the repository; choose a folder outside of it")
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"Installing {' '.join(packages)} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def published_python(release, folder):
    """The interpreter of an environment with the published package beside the running JAX."""
    folder = folder or CACHE / f"braintrace-{release}-jax-{version('jax')}"
    wanted = f"{release} {version('jax')}"
    accelerator = re.compile(r"jax$|jaxlib$|jax[-_]cuda|jax[-_]rocm|nvidia[-_]")
    same = [f"{d.name}=={d.version}" for d in distributions() if accelerator.match(d.name)]
    python = environment(folder, [f"braintrace=={release}", "brainpy", "braintools", "numba", *same])
    ask = "from importlib.metadata import version as v; print(v('braintrace'), v('jax'))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip()
    if found != wanted:
        raise SystemExit(
            f"{folder} holds braintrace and jax {found or '(not both)'}, not {wanted}: remove it or pass another "
            "--published-env"
        )
    return python


def rival(name, folder):
    if name not in RIVALS:
        raise SystemExit(f"--rivals {name}: give names out of {', '.join(RIVALS)}")
    packages, cases = RIVALS[name]
    python = environment(Path(folder or CACHE / name), packages)
    return Contestant(python, worker=f"rival_{name}.py", learner=False, cases=cases)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    patterns = f"patterns {'/'.join(CORE)}, parts at the end may be left out"
    parser.add_argument("--only", default="*", help=patterns)
    parser.add_argument("--sizes", default=",".join(CORE["size"]), help=f"what * stands for, of {', '.join(SIZES)}")
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
    parser.add_argument("--rivals", default="", metavar="NAME[=ENV]", help=f"other libraries: {', '.join(RIVALS)}")
    parser.add_argument("--output", type=Path, help="page to write, or to write into; else the tables are printed")
    parser.add_argument("--wide", type=Path, help="file for the tables with all that was measured")
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
    cases = select(options.only.split(","), options.sizes)
    contestants = {
        BASELINE: Contestant(sys.executable, str(ROOT), learner=False, here=options.one_process),
        THIS: Contestant(sys.executable, str(ROOT), here=options.one_process),
    }
    if not (options.skip_published or options.one_process):
        contestants[PUBLISHED] = Contestant(published_python(options.release, options.published_env))
    for name, _, folder in (text.partition("=") for text in filter(None, options.rivals.split(","))):
        contestants[name] = rival(name, folder)

    # Results of another machine, version, set of contestants or effort are no part of this comparison.
    setting = report.setting(ROOT) | {"contestants": list(contestants), "release": options.release}
    setting["effort"] = [options.rounds, options.repeats, options.time_limit, options.memory_steps]
    finished = {}
    if options.results and not setting["modified"]:
        _, finished = report.read(options.results, setting)

    for i, case in enumerate(cases, 1):
        if case not in finished:
            finished[case] = measure(case, contestants, options)
            if options.results:
                with options.results.open("a") as f:
                    record = {"setting": setting, "case": asdict(case), "results": finished[case]}
                    f.write(json.dumps(record) + "\n")
        print(f"[{i}/{len(cases)}] {case}: {report.summary(case, finished[case])}", flush=True)
        report.write(setting, finished, options.output, options.wide)
    if not options.output:
        print("\n" + report.page(setting, finished))


if __name__ == "__main__":
    main()
