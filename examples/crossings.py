"""What a compiled program sends between devices, as its text tells."""

import collections
import math
import re

import numpy as np

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


def size(dtype, shape):
    """Bytes of an array."""
    item = 1 if dtype == "pred" else np.ceil(int(re.sub(r"\D", "", dtype)) / 8)
    return int(item) * math.prod(map(int, filter(None, shape.split(","))))


def bytes_crossing(program):
    """Kind of collective -> bytes that it leaves on each device, in one run of a program; loops count in full."""
    computations, entry, lines = {}, None, []
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        lines.append(line)

    def total(name):
        found = collections.Counter()
        for line in computations.get(name, [])[1:]:
            for arrays, kind in COLLECTIVE.findall(line):
                found[kind] += sum(size(*array) for array in ARRAY.findall(arrays))
            trips = TRIPS.search(line)
            for called in CALLED.findall(line):
                for kind, n in total(called).items():
                    found[kind] += n * (int(trips[1]) if trips and " while(" in line else 1)
        return found

    return dict(total(entry))
