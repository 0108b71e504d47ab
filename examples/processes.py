"""Train in several processes, each with its part of the batch, and go on from the last checkpoint if one dies.

    python examples/launch.py --processes 2 examples/processes.py                  # on this machine
    python examples/launch.py --processes 2 examples/processes.py --die-at 30      # one of them dies on the way

On several machines start it on each, with the address of the first one and a number:

    python examples/processes.py --processes 2 --coordinator 10.0.0.1:4321 --number 0 --checkpoint /shared/run.npz
    python examples/processes.py --processes 2 --coordinator 10.0.0.1:4321 --number 1 --checkpoint /shared/run.npz
"""

import argparse
import inspect
import os
import sys
from pathlib import Path

import brainstate
import braintools
import jax
import jax.numpy as jnp
import numpy as np
from adding import AddingNet, draw, squared_error
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import braintrace

STEPS = 50


def connect(args):
    """Make one JAX program of all processes. One that is silent for some seconds is taken as dead."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds = {name: args.patience for name in ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")}
    known = inspect.signature(jax.distributed.initialize).parameters  # the second one is not in every JAX
    jax.distributed.initialize(
        args.coordinator, args.processes, args.number, **{k: v for k, v in seconds.items() if k in known}
    )


def train(args):
    """What every process runs: the same program, on its part of every batch."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))  # the devices of all processes
    brainstate.random.seed(args.seed)  # the same parameters in each
    model = AddingNet("gru", args.units, STEPS)
    learner = braintrace.compile(model, "d_rtrl", jnp.zeros((args.batch, 2)), batch_size=args.batch)
    optimizer = braintools.optim.Momentum(lr=0.02, momentum=0.9)
    optimizer.register_trainable_weights(learner.param_states)
    braintrace.shard(learner, mesh, batch="batch")

    @brainstate.transform.jit
    def update(before, inputs, targets):
        brainstate.nn.reset_all_states(model, batch_size=args.batch)
        learner.reset_state()
        learner.etrace_evolve(before)
        grads, loss = learner.etrace_grad(
            inputs,
            targets,
            step_fn=lambda x, y: squared_error(learner(x), y),
            loss_output="scalar",
            return_value=True,
        )
        optimizer.step(grads)
        return loss

    def spread(array):
        """Every process has its part of the array (here it has drawn the others as well)."""
        sharding = NamedSharding(mesh, PartitionSpec(*[None, "batch"][: array.ndim]))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    start = braintrace.load(args.checkpoint, learner, optimizer)["step"] if args.checkpoint.exists() else 0
    for step in range(start, args.updates):
        if step == args.die_at and start == 0 and args.number == args.processes - 1:
            os._exit(1)
        inputs, sums = draw(np.random.default_rng((args.seed, step)), args.batch, STEPS)
        loss = update(*map(spread, (inputs[:-1], inputs[-1:], sums)))  # the last step has the answer
        if (step + 1) % args.every == 0 or step + 1 == args.updates:
            braintrace.save(args.checkpoint, learner, optimizer, step=step + 1)
            if args.number == 0:
                print(f"step {step + 1}: squared error {float(loss):.4f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--coordinator", help="address and port of the first process")
    parser.add_argument("--number", type=int, default=0, help="of this process")
    parser.add_argument("--patience", type=int, default=10, help="seconds without a sign of life of another process")
    parser.add_argument("--checkpoint", type=Path, default=Path("processes.npz"), help="a file that all of them see")
    parser.add_argument("--every", type=int, default=20, help="updates between two checkpoints")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="for the initial weights and the trials")
    parser.add_argument(
        "--die-at", type=int, help="the last process dies before this update, unless it has been loaded"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: six updates of a small network")
    args = parser.parse_args()
    if args.quick:
        args.updates, args.every, args.batch, args.units, args.patience = 6, 2, 4, 8, 5
    if args.processes > 1:
        connect(args)
    try:
        train(args)
    except jax.errors.JaxRuntimeError as error:
        # Another process is gone. End at once: an orderly end would wait for it.
        print(f"process {args.number} ends: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
