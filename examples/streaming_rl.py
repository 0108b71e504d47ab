"""Learn to act from a stream of experience: one step at a time, each used once and forgotten.

In the *memory chain* a cue at the first step, one of two, says which action is right at the last one, which is marked;
in between there is noise. In *pole balancing* a cart is pushed left or right so that its pole does not fall, for up to
500 steps, and sees positions but no velocities, which it has to make up from what it remembers.

Actor and critic read one recurrent layer and learn at every step: the weights move along a trace of their gradients,
times what came as a surprise (the error of the temporal difference). The gradient of a step reaches back through the
eligibility traces of the layer (`d_rtrl`), or not at all (`immediate`, truncated back-propagation through one step).

    python examples/streaming_rl.py --length 32 --cell rtu --rule d_rtrl
    python examples/streaming_rl.py --task pole --cell lru --out pole.png
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm
from training import OPTIMIZERS, parser, report, save

import braintrace

WIDTH = 16  # of the linear recurrent layer, whose inputs and outputs are equally many: it sees an input several times
PIECES = 50  # of the stream, between which the progress is shown


@dataclass
class World:
    """`start(key)` gives a state, `observe(state)` what is seen, `act(state, action)` state, reward and end."""

    start: Callable
    observe: Callable
    act: Callable
    score: Callable  # of the mean return of an episode
    score_name: str
    n_in: int
    steps: int
    discount: float
    ring: tuple  # between which absolute values the factors of linear units begin


def chain(length):
    def start(key):
        signs = jax.random.rademacher(key, (length + 1,), jnp.float32)
        return jnp.asarray(0), signs[0], signs[1:]

    def observe(state):
        t, cue, noise = state
        return jnp.stack([jnp.where(t == 0, cue, 0.0), noise[t], jnp.where(t == length - 1, 1.0, 0.0)])

    def act(state, action):
        t, cue, noise = state
        last = t == length - 1
        return (t + 1, cue, noise), jnp.where(last, jnp.where((action == 1) == (cue > 0), 1.0, -1.0), 0.0), last

    ring = max(0.5, 1 - 4 / length), 1 - 0.4 / length
    return World(start, observe, act, lambda r: (1 + r) / 2, "right answers", 3, 8000 * length, 0.9, ring)


def pole():
    def start(key):
        return jnp.asarray(0), jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    def observe(state):
        x, _, angle, _ = state[1]
        return jnp.stack([x / 2.4, angle / 0.2])

    def act(state, action):
        t, (x, v, angle, spin) = state
        force, sin, cos = jnp.where(action == 1, 10.0, -10.0), jnp.sin(angle), jnp.cos(angle)
        push = (force + 0.05 * spin**2 * sin) / 1.1  # pole of 0.1 kg with a half length of 0.5 m, cart of 1 kg
        spin_rate = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        rate = push - 0.05 * spin_rate * cos / 1.1
        after = jnp.stack([x + 0.02 * v, v + 0.02 * rate, angle + 0.02 * spin, spin + 0.02 * spin_rate])
        end = (jnp.abs(after[0]) > 2.4) | (jnp.abs(after[2]) > 0.2095) | (t + 1 >= 500)
        return (t + 1, after), jnp.asarray(0.02), end

    return World(start, observe, act, lambda r: r / 0.02, "steps balanced", 2, 300_000, 0.99, (0.9, 0.999))


class Agent(brainstate.nn.Module):
    def __init__(self, cell, n_in, n_units, ring):
        super().__init__()
        self.n_in = WIDTH if cell == "lru" else n_in
        self.cell = {
            "lru": lambda: braintrace.nn.LRUCell(WIDTH, n_units, *ring),
            "rtu": lambda: braintrace.nn.RTUCell(n_in, n_units, *ring),
            "gru": lambda: braintrace.nn.GRUCell(n_in, n_units),
        }[cell]()
        n_out = {"lru": WIDTH, "rtu": 2 * n_units, "gru": n_units}[cell]
        self.actor, self.critic = braintrace.nn.Linear(n_out, 2), braintrace.nn.Linear(n_out, 1)

    def update(self, x):
        features = jnp.tanh(self.cell(jnp.resize(x, self.n_in)))
        return self.actor(features), self.critic(features)[0]


class Stream:
    """An agent in its world; `self.live` takes steps, and learns from each."""

    def __init__(self, args, world):
        brainstate.random.seed(args.seed)
        self.world, self.fade = world, 0.9 * world.discount  # of the trace of gradients
        agent = Agent(args.cell, world.n_in, 32, world.ring)
        options = {"decay_or_rank": 0.9} if args.rule in ("pp_prop", "hybrid") else {}
        self.learner = braintrace.compile(agent, args.rule, jnp.zeros(world.n_in), **options)
        self.weights = agent.states(brainstate.ParamState)
        self.memory = [s for s in self.learner.states().values() if not isinstance(s, brainstate.ParamState)]
        scale, kind = OPTIMIZERS[args.optimizer]
        self.optimizer = kind(lr=scale * (args.lr or 1e-3))
        self.optimizer.register_trainable_weights(self.weights)

    def begin(self, key):
        """The state of the world, the trace of gradients, and what is left of the step before: none."""
        trace = {k: jax.tree.map(jnp.zeros_like, w.value) for k, w in self.weights.items()}
        return self.world.start(key), trace, *jnp.zeros(2), jnp.asarray(True), jnp.zeros(())

    def step(self, before, key):
        state, trace, value, reward, ended, total = before
        for memory in self.memory:  # an episode begins with empty states and eligibility traces
            memory.value = jax.tree.map(lambda m: jnp.where(ended, jnp.zeros_like(m), m), memory.value)
        choose, start = jax.random.split(key)

        def objective():
            logits, value = self.learner(self.world.observe(state))
            action = jax.random.categorical(choose, jax.lax.stop_gradient(logits))
            return value + jax.nn.log_softmax(logits)[action], (action, value)

        gradient, (action, new_value) = brainstate.transform.grad(objective, self.weights, has_aux=True)()
        surprise = reward + jnp.where(ended, 0.0, self.world.discount * new_value) - value
        self.optimizer.step(jax.tree.map(lambda z: -surprise * z, trace))
        fade = jnp.where(ended, 0.0, self.fade)
        trace = jax.tree.map(lambda z, g: fade * z + g, trace, dict(gradient))
        state, reward, ended = self.world.act(state, action)
        total = total + reward
        state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), self.world.start(start), state)
        return (state, trace, new_value, reward, ended, jnp.where(ended, 0.0, total)), (total, ended)

    def live(self, before, keys):
        return brainstate.transform.scan(self.step, before, keys)


def main():
    options = parser(__doc__.splitlines()[0], rules=("immediate", "pp_prop", "hybrid", "d_rtrl"))
    options.add_argument("--task", choices=["chain", "pole"], default="chain")
    options.add_argument("--length", type=int, default=32, help="steps of the memory chain, 2 to 128")
    options.add_argument("--cell", choices=["lru", "rtu", "gru"], default="lru")
    args = options.parse_args()
    world = chain(args.length) if args.task == "chain" else pole()
    steps = args.updates or (PIECES * 10 if args.quick else world.steps)
    stream = Stream(args, world)
    first, *keys = jax.random.split(jax.random.key(args.seed), PIECES + 1)
    live = brainstate.transform.jit(stream.live)
    now, returns, seconds = stream.begin(first), [], []
    example = now, jax.random.split(first, steps // PIECES)
    progress = tqdm(keys, desc=args.rule, ncols=100)
    for key in progress:
        begin = time.perf_counter()
        now, lived = live(now, jax.random.split(key, steps // PIECES))
        totals, ends = map(np.asarray, lived)
        ended = totals[ends] if ends.any() else totals[-1:]  # or what there is of an episode that goes on
        returns.append(float(world.score(ended.mean())))
        seconds.append((time.perf_counter() - begin) / (steps // PIECES))
        progress.set_postfix(score=f"{returns[-1]:.3f}", refresh=False)

    def draw(axes):
        axes.plot(np.linspace(0, steps, PIECES), returns)
        axes.set(title=f"{args.task}, {args.cell.upper()}, {args.rule}", xlabel="step", ylabel=world.score_name)

    if args.out:
        save(args.out, draw, panels=1)
    name = f"memory chain of {args.length}" if args.task == "chain" else "pole balancing"
    memory = live.compile(*example).memory_analysis().temp_size_in_bytes / 2**20
    score = float(np.mean(returns[-PIECES // 10 :]))
    report(args, f"{name}, {args.cell.upper()}", world.score_name, score, steps, float(np.median(seconds)), memory)


if __name__ == "__main__":
    main()
