"""What can be compared: models, sizes, modes, rules and works, and which of their combinations run."""

import itertools
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

SIZES = {
    "tiny": dict(batch=2, inputs=5, units=8, outputs=3, steps=10),
    "S": dict(batch=32, inputs=100, units=256, outputs=10, steps=200),
    "M": dict(batch=64, inputs=700, units=512, outputs=20, steps=200),
    "L": dict(batch=256, inputs=1024, units=2048, outputs=20, steps=200),
    "E": dict(batch=32, inputs=40, units=80, outputs=2, steps=450),
    "S64": dict(batch=32, inputs=100, units=64, outputs=10, steps=200),
    "S128": dict(batch=32, inputs=100, units=128, outputs=10, steps=200),
}
# What `*` stands for in a pattern (of the sizes: --sizes), and what is taken by its name alone.
CORE = {
    "model": ["lif", "alif", "gru", "lstm"],
    "size": ["S", "M"],
    "mode": ["batched", "vmap"],
    "rule": ["pp_prop", "D_RTRL", "EProp"],
    "work": ["sequence", "step", "memory"],
}
MORE = {
    "model": ["gif", "ei", "sparse", "conv", "rnn", "lru"],
    "size": [size for size in SIZES if size not in CORE["size"]],
    "mode": [],
    "rule": ["hybrid", "OSTLRecurrent", "SnAp-2", "UORO", "D_RTRL-bf16"],
    "work": ["evolve", "late"],
}
# What the pattern `*` alone adds to the product of `CORE`.
EXTRAS = [
    *(
        f"{model}/S/batched/{rule}/sequence"
        for model in ["gif", "sparse", "conv", "lru"]
        for rule in ["pp_prop", "D_RTRL"]
    ),
    *(f"ei/E/batched/{rule}/{work}" for rule in ["pp_prop", "D_RTRL"] for work in ["evolve", "late"]),
    *(f"gru/S128/batched/{rule}/{work}" for rule in ["pp_prop", "D_RTRL"] for work in ["sequence", "evolve"]),
    *(f"lif/S/batched/{rule}/sequence" for rule in ["hybrid", "OSTLRecurrent", "UORO"]),
    "rnn/S64/batched/SnAp-2/sequence",
    "lif/M/batched/D_RTRL-bf16/step",
]


@dataclass(frozen=True)
class Case:
    """What to compute."""

    model: str
    size: str
    mode: str
    rule: str
    work: str

    def __str__(self):
        return "/".join(asdict(self).values())

    @property
    def core(self):
        fields = asdict(self)
        return all(fields[name] in CORE[name] for name in ["model", "mode", "rule", "work"])

    @property
    def steps(self):
        return SIZES[self.size]["steps"]

    def matches(self, pattern):
        return all(map(fnmatchcase, asdict(self).values(), pattern.split("/")))


def expand(pattern, sizes):
    """The cases of one pattern. Where it names no size, memory is measured for the first alone."""
    globs = pattern.split("/")
    if len(globs) > len(CORE):
        raise SystemExit(f"--only {pattern}: more parts than {'/'.join(CORE)}")
    globs += ["*"] * (len(CORE) - len(globs))
    choices = []
    for (field, core), glob in zip((CORE | {"size": sizes}).items(), globs):
        every = list(SIZES) if field == "size" else core + MORE[field]
        choices.append(core if glob == "*" else [value for value in every if fnmatchcase(value, glob)])
        if not choices[-1]:
            raise SystemExit(f"--only {pattern}: {glob!r} is no {field}; give one of {', '.join(every)}, or *")
    cases = [Case(*values) for values in itertools.product(*choices)]
    return [case for case in cases if case.work != "memory" or globs[1] != "*" or case.size == sizes[0]]


def select(patterns, sizes):
    """The cases that match a pattern, in order and once each."""
    patterns = patterns + EXTRAS * ("*" in patterns)
    return list(dict.fromkeys(case for pattern in patterns for case in expand(pattern, sizes)))
