"""Fit the activity of a whole brain of spiking neurons, online: the size of a fruit fly's, on a laptop.

A synthetic connectome has 139,255 leaky integrate-and-fire neurons in 68 regions and a million synapses, with heavy-
tailed numbers of synapses per neuron. A hidden teacher has the same connections, but synapses into some regions are
stronger and into others weaker. The student sees only the teacher's firing rates, averaged over each region, and
corrects all of its synapses every ten milliseconds while it runs, with `pp_prop`: the traces are four numbers per
neuron, and nothing per synapse.

    python examples/whole_brain.py --out whole_brain.png
    python examples/whole_brain.py --synapses 15000000 --periods 4   # needs 4 GB of memory

With several devices, or virtual ones on a CPU, each has a part of the neurons and the synapses into them; spikes cross.

    python examples/whole_brain.py --devices 8 --periods 4
"""

import argparse
import os
import sys
import time
from pathlib import Path

import brainevent
import brainpy
import brainstate
import braintools
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
from crossings import bytes_crossing
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import braintrace

N_REGIONS = 68
LOCAL = 0.6  # share of the synapses that stay in their region
INHIBITORY = 0.3  # share of the neurons that inhibit
RATE_TAU = 50.0 * u.ms  # firing rates are averages over this time
# With it the places of the synapses are no constants of a program, of which every device has all, but arguments of it.
SPREAD_CONSTANTS = "JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS"


def make_connectome(n_neurons, n_synapses, rng):
    """Draw a connectome.

    Returns the region of every neuron (ascending), and the synapses as pointers ``(n_neurons + 1,)`` of presynaptic
    neurons into their targets ``(n_synapses,)``.
    """
    region = np.sort(rng.choice(N_REGIONS, n_neurons, p=rng.dirichlet(np.full(N_REGIONS, 3.0))))
    sends, receives = np.cumsum(np.minimum(rng.pareto([[1.3], [1.5]], (2, n_neurons)) + 0.2, 300.0), axis=1)
    receives = np.concatenate([[0.0], receives])
    borders = receives[np.searchsorted(region, np.arange(N_REGIONS + 1))]

    def draw(n):
        pre = np.searchsorted(sends, rng.uniform(0.0, sends[-1], n))
        local = rng.random(n) < LOCAL
        low = np.where(local, borders[region[pre]], 0.0)
        high = np.where(local, borders[region[pre] + 1], receives[-1])
        post = np.searchsorted(receives, rng.uniform(low, high), side="right") - 1
        return pre * n_neurons + np.minimum(post, n_neurons - 1)

    pairs = np.unique(draw(n_synapses))
    while len(pairs) < n_synapses:
        pairs = np.union1d(pairs, draw(n_synapses // 4))
    pairs = np.delete(pairs, rng.choice(len(pairs), len(pairs) - n_synapses, replace=False))
    pre, post = np.divmod(pairs, n_neurons)
    pointers = np.concatenate([[0], np.cumsum(np.bincount(pre, minlength=n_neurons))])
    return region, pointers.astype(np.int32), post.astype(np.int32)


class Brain(brainstate.nn.Module):
    """Leaky integrate-and-fire neurons with exponential synapses; the output is the firing rate of every region."""

    def __init__(self, connectome, strengths, drive, n_devices):
        super().__init__()
        region, pointers, targets = connectome
        n = len(region)
        matrix = brainevent.CSR((strengths, targets, pointers), shape=(n, n))
        if n_devices > 1:
            matrix = braintrace.columns_in_parts(matrix, n_devices)
        self.region, self.drive = jnp.asarray(region), drive
        self.region_size = jnp.asarray(np.bincount(region, minlength=N_REGIONS), jnp.float32)
        start = braintools.init.Uniform(-52.0 * u.mV, -45.0 * u.mV)
        self.neurons = brainpy.state.LIF(
            n, tau=20.0 * u.ms, V_rest=-52.0 * u.mV, V_reset=-52.0 * u.mV, V_th=-45.0 * u.mV, V_initializer=start
        )
        self.synapses = brainpy.state.AlignPostProj(
            comm=braintrace.nn.SparseLinear(matrix),
            syn=brainpy.state.Expon(n, tau=5.0 * u.ms),
            out=brainpy.state.CUBA(scale=1.0 * u.volt),
            post=self.neurons,
        )
        self.spikes = brainpy.state.Expon(n, tau=RATE_TAU, g_initializer=braintools.init.Constant(0.0))

    def update(self, stimulus):
        """Advance by one step. ``stimulus`` has one entry per region, and so have the rates, in spikes per second."""
        self.synapses(self.neurons.get_spike() > 0)  # one byte each where they cross between devices
        recent = self.spikes(self.neurons(self.drive + stimulus[self.region]))
        total = jax.ops.segment_sum(recent, self.region, N_REGIONS, indices_are_sorted=True)
        return (total / self.region_size / RATE_TAU).to_decimal(u.Hz)


def make_brains(args, rng):
    """A connectome, and a teacher and a student, which differ in the strengths of the synapses into each region."""
    connectome = region, pointers, targets = make_connectome(args.neurons, args.synapses, rng)
    drive = jnp.asarray(rng.normal(6.5, 1.5, args.neurons), jnp.float32) * u.mA
    sign = np.where(rng.random(args.neurons) < INHIBITORY, -2.0, 1.0)
    n_inputs = np.bincount(targets, minlength=args.neurons)
    strengths = np.repeat(sign, np.diff(pointers)) * rng.lognormal(0.5, 0.5, args.synapses) / np.sqrt(n_inputs[targets])
    gain = rng.lognormal(0.0, 0.7, N_REGIONS)[region[targets]]
    teacher = Brain(connectome, jnp.asarray(strengths * gain, jnp.float32) * u.mS, drive, args.devices)
    student = Brain(connectome, jnp.asarray(strengths, jnp.float32) * u.mS, drive, args.devices)
    return connectome, teacher, student


def with_devices(args):
    """A mesh, for which the script starts anew, with virtual devices of the CPU if there are too few."""
    if args.devices > 1 and SPREAD_CONSTANTS not in os.environ:
        variables = {SPREAD_CONSTANTS: "true"}
        if jax.device_count() < args.devices:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
            variables |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables)
    args.neurons += -args.neurons % args.devices  # as many on each
    return Mesh(np.array(jax.devices()[: args.devices]), ("neurons",))


def spread(model, mesh):
    """Give every device its part of the neurons, and of the synapses into them."""
    own = NamedSharding(mesh, PartitionSpec("neurons"))
    for state in model.states().values():
        state.value = jax.tree.map(lambda x: jax.device_put(x, own) if x.ndim else x, state.value)


def make_stimulus(n_steps, rng):
    """Currents ``(time, region)``: every region has its own rhythm."""
    period = rng.uniform(100.0, 500.0, N_REGIONS)
    phase = rng.uniform(0.0, 2 * np.pi, N_REGIONS)
    time_step = np.arange(n_steps)[:, None]
    return jnp.asarray(2.0 * np.sin(2 * np.pi * time_step / period + phase), jnp.float32) * u.mA


def simulation(model):
    """A compiled function from a stimulus to the rates ``(time, region)``."""
    return brainstate.transform.jit(lambda stimulus: brainstate.transform.for_loop(model, stimulus))


def learning(student, mesh, args):
    """A compiled function that corrects the student while it runs, and returns its mean squared error."""
    learner = braintrace.compile(student, "pp_prop", jnp.zeros(N_REGIONS) * u.mA, decay_or_rank=0.97)
    if args.devices > 1:
        braintrace.shard(learner, mesh, units=dict.fromkeys(("neurons", "synapses", "spikes"), "neurons"))
    learner.show_graph()
    weights = student.states(brainstate.ParamState)
    optimizer = braintools.optim.SGD(lr=args.lr * args.every)
    optimizer.register_trainable_weights(weights)
    report_memory({"network": student, "traces": learner, "optimizer": optimizer}, args)

    def step_loss(stimulus, target):
        return jnp.mean((learner(stimulus) - target) ** 2)

    def learn(stimulus, targets):
        grads, loss = learner.etrace_grad(
            stimulus, targets, step_fn=step_loss, weights=weights, loss_output="scalar", return_value=True
        )
        optimizer.step(grads)
        return loss

    def learn_all(stimulus, targets):
        parts = [a.reshape((-1, args.every, N_REGIONS)) for a in (stimulus, targets)]
        return brainstate.transform.for_loop(learn, *parts).mean()

    return brainstate.transform.jit(learn_all)


def report_memory(owners, args):
    """Print what each owner keeps from one step to the next, beside what those before it keep."""
    seen, entries = set(), jnp.shape(owners["network"].synapses.comm.weight.value["weight"])
    for name, owner in owners.items():
        states = [s for s in brainstate.graph.states(owner).values() if id(s) not in seen]
        seen.update(map(id, states))
        shapes = [jnp.shape(v) for v in jax.tree.leaves([s.value for s in states])]
        per_neuron = sum(np.prod(s) for s in shapes if s[:1] == (args.neurons,)) / args.neurons
        per_synapse = sum(s == entries for s in shapes)
        print(f"{name:>9}: {per_neuron:.0f} numbers per neuron, {per_synapse} per synapse")


def report_devices(learn, args):
    """Print what the compiled program of one stimulus sends between devices, and what it needs on each."""
    example = jnp.zeros((args.period, N_REGIONS))
    program = learn.compile(example * u.mA, example)
    crossing = {kind: f"{n / args.period:,.0f}" for kind, n in bytes_crossing(program.as_text()).items()}
    print(f"bytes that cross per step: {crossing}")
    memory = program.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes / 2**20, memory.temp_size_in_bytes / 2**20
    print(f"memory per device: {arguments:.1f} MiB of arguments, {temporary:.1f} MiB of temporary arrays")


def timed(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def settled(run, stimulus):
    """The rates in a second run, free of what was before the first."""
    run(stimulus)
    return np.asarray(run(stimulus))


def draw(connectome, targets, before, after, errors, args):
    """Plot the connectome, the course of learning, and what the student does before and after."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    degrees, error, scatter, course = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    _, pointers, posts = connectome
    for name, count in {"out": np.diff(pointers), "in": np.bincount(posts)}.items():
        degrees.loglog(np.sort(count)[::-1] + 0.5, np.arange(1, len(count) + 1) / len(count), label=name)
    degrees.set(title="synapses per neuron", xlabel="at least", ylabel="share of neurons")
    degrees.legend(frameon=False)
    error.plot(np.arange(1, len(errors) + 1) * args.period / 1000, errors)
    error.set(title="error of the rates (Hz)", xlabel="time (s)", ylim=(0, None))
    top = 1.1 * targets.mean(axis=0).max()
    scatter.plot([0, top], [0, top], color="gray", linewidth=0.8)
    for name, rates in {"before": before, "after": after}.items():
        scatter.scatter(targets.mean(axis=0), rates.mean(axis=0), s=8, label=name)
    scatter.set(title="mean rates (Hz)", xlabel="teacher", ylabel="student", xlim=(0, top), ylim=(0, top))
    scatter.legend(frameon=False)
    region = np.argmax(np.abs(before - targets).mean(axis=0))
    for name, rates in {"teacher": targets, "before": before, "after": after}.items():
        course.plot(rates[:, region], label=name, color="black" if name == "teacher" else None)
    course.set(title=f"rate of region {region} (Hz)", xlabel="time (ms)")
    course.legend(frameon=False)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, default=139_255)
    parser.add_argument("--synapses", type=int, default=1_000_000)
    parser.add_argument("--periods", type=int, default=12, help="how many stimuli to learn from")
    parser.add_argument("--period", type=int, default=500, help="milliseconds of one stimulus")
    parser.add_argument(
        "--every", type=int, default=10, help="milliseconds between two corrections; divides the period"
    )
    parser.add_argument("--lr", type=float, default=100.0, help="learning rate per millisecond")
    parser.add_argument("--seed", type=int, default=0, help="for the connectome and the stimuli")
    parser.add_argument("--devices", type=int, default=1, help="how many have a part of the neurons")
    parser.add_argument("--quick", action="store_true", help="a smoke run: three short periods of 5000 neurons")
    parser.add_argument("--out", type=Path, default=Path("whole_brain.png"), help="where to save the picture")
    args = parser.parse_args()
    if args.quick:
        args.neurons, args.synapses, args.periods, args.period = 5_000, 40_000, 3, 50
    if args.period % args.every:
        parser.error(f"--every {args.every} does not divide --period {args.period}")

    mesh = with_devices(args)
    rng = np.random.default_rng(args.seed)
    brainstate.random.seed(args.seed)
    connectome, teacher, student = make_brains(args, rng)
    brainstate.nn.init_all_states(teacher)
    brainstate.nn.init_all_states(student)
    if args.devices > 1:
        spread(teacher, mesh)
    run_teacher, run_student, learn = simulation(teacher), simulation(student), learning(student, mesh, args)
    if args.devices > 1:
        report_devices(learn, args)
    test = make_stimulus(args.period, rng)
    before = settled(run_student, test)
    settled(run_teacher, test)

    errors, forward, online = [], [], []
    progress = tqdm(range(args.periods), ncols=100)
    for _ in progress:
        stimulus = make_stimulus(args.period, rng)
        targets, seconds = timed(run_teacher, stimulus)
        forward.append(seconds * 1000 / args.period)
        loss, seconds = timed(learn, stimulus, targets)
        online.append(seconds * 1000 / args.period)
        errors.append(float(jnp.sqrt(loss)))
        progress.set_postfix(error=f"{errors[-1]:.2f} Hz")

    targets, after = settled(run_teacher, test), settled(run_student, test)
    error_before, error_after = (np.sqrt(np.mean((rates - targets) ** 2)) for rates in (before, after))
    print(f"error on a new stimulus: {error_before:.2f} Hz before, {error_after:.2f} Hz after")
    forward, online = np.median(forward), np.median(online)
    print(f"one step takes {forward:.2f} ms, with learning {online:.2f} ms: {online / forward:.1f} x")
    draw(connectome, targets, before, after, errors, args)
    print(f"the picture is in {args.out}")


if __name__ == "__main__":
    brainstate.environ.set(dt=1.0 * u.ms)
    main()
