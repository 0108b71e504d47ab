"""Sequences of `lif` by back-propagation in snnTorch: one case in one process, one line of JSON as from worker.py."""

import json
import math
import os
import sys
import time

STARTED = time.monotonic()

import snntorch  # noqa: E402
import torch  # noqa: E402

TAU_MEMBRANE, TAU_SYNAPSE, TAU_READOUT = 20.0, 5.0, 5.0


class Network(torch.nn.Module):
    """Recurrent LIF neurons behind exponential synapses, read by a leaky integrator."""

    def __init__(self, inputs, units, outputs):
        super().__init__()
        membrane = math.exp(-1 / TAU_MEMBRANE)
        self.connections = torch.nn.Linear(inputs + units, units, bias=False)
        torch.nn.init.kaiming_normal_(self.connections.weight)
        self.connections.weight.data *= 1 - membrane  # the input of the membrane's exponential Euler step
        self.neurons = snntorch.Synaptic(alpha=math.exp(-1 / TAU_SYNAPSE), beta=membrane)
        self.readout = torch.nn.Linear(units, outputs, bias=False)
        self.integrator = snntorch.Leaky(beta=math.exp(-1 / TAU_READOUT), reset_mechanism="none")

    def forward(self, xs, labels):
        """The mean loss over a sequence, from reset states."""
        spikes = xs.new_zeros(xs.shape[1], self.connections.out_features)
        (synapse, membrane), trace, total = self.neurons.init_synaptic(), self.integrator.init_leaky(), 0.0
        for x in xs:
            current = self.connections(torch.cat([x, spikes], dim=-1))
            spikes, synapse, membrane = self.neurons(current, synapse, membrane)
            _, trace = self.integrator(self.readout(spikes), trace)
            total = total + torch.nn.functional.cross_entropy(trace, labels)
        return total / len(xs)


def main(started, steps, repeats, limit, size, **_):
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    network = Network(size["inputs"], size["units"], size["outputs"])
    xs = (torch.rand(steps, size["batch"], size["inputs"]) < 0.1).float()
    labels = torch.randint(size["outputs"], (size["batch"],))
    parameters = list(network.parameters())

    def seconds():
        start = time.perf_counter()
        torch.autograd.grad(network(xs, labels), parameters)
        return time.perf_counter() - start

    for _ in range(2):
        seconds()
    times = [seconds()]
    while len(times) < repeats and time.monotonic() + 2 * times[-1] < started + 0.9 * limit:
        times.append(seconds())
    return {"times": times, "steps": steps, "device": f"torch {torch.__version__}, snntorch {snntorch.__version__}"}


if __name__ == "__main__":
    print(json.dumps(main(STARTED, **json.loads(sys.argv[1]))))
