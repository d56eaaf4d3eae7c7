"""How fast every published learner is beside dual TTT-Linear at the same shape, on whatever JAX runs on here.

    python benchmarks/learners.py                                   # all, forward, and forward with backward
    python benchmarks/learners.py --learners gated_deltanet titans  # some

It times `tttlm.ops.ttt.learn` alone, without projections. Learners are timed in turn, A B A B ..., so that a drift of
the machine meets all of them; medians are printed, as a table in Markdown.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from tttlm.ops.ttt import Learner, LearnerInputs, Ridge, Shapes, learn, published, supported
from tttlm.ops.ttt.cost import flops_per_token, initial_weights, input_shapes
from tttlm.ops.ttt.transforms import factor, one_minus

BASE = "ttt_linear"


@dataclass(frozen=True)
class Arguments:
    """Times learners."""

    learners: tuple[str, ...] = ()
    """Those to time beside TTT-Linear; none for all."""
    passes: tuple[Literal["forward", "forward+backward"], ...] = ("forward", "forward+backward")
    batch: int = 1
    time: int = 512
    num_heads: int = 4
    head_dim: int = 64
    chunk_size: int = 16
    """Tokens of a chunk; those of LaCT, In-Place TTT and TNT's global memory are four times as long."""
    repeats: int = 5
    """Timed calls of each; the median counts."""


def descriptions(k: int, m: int) -> dict[str, tuple[Learner, ...]]:
    """Every published learner; of TNT the two whose outputs are summed."""
    scale, long = k**-0.5, 4 * m
    one = {
        BASE: published.ttt((), m),
        "ttt_mlp": published.ttt((4 * k,), m),
        "linear_attention": published.linear_attention(scale),
        "simple_gla": published.linear_attention(scale, gate=True),
        "gla": published.linear_attention(scale, gate=True, per_channel=True),
        "deltanet": published.delta_rule(scale),
        "gated_deltanet": published.delta_rule(scale, gate=True),
        "kda": published.delta_rule(scale, gate=True, per_channel=True),
        "deltaproduct": published.delta_rule(scale, gate=True, writes_per_token=2),
        "comba": published.comba(scale),
        "mesanet": published.mesanet(),
        "longhorn": published.longhorn(),
        "longhorn_diagonal": published.longhorn(diagonal=True),
        "titans_linear": published.titans((), m),
        "titans_mlp": published.titans((4 * k,), m),
        "titans_pytorch": published.neural_memory(4 * k, m),
        "lact": published.lact(k, long, momentum=True),
        "lact_muon": published.lact(k, long, momentum=True, muon=True),
        "inplace_ttt": published.inplace_ttt(long),
        "omeganet": published.omega((), 4, m),
        "atlas_without_muon": published.atlas((), 4, m, muon=False),
        "atlas": published.atlas((), 4, m),
    }
    return {name: (learner,) for name, learner in one.items()} | {"tnt": published.tnt((), long, (m,), (long,))}


def random_arguments(learner: Learner, a: Arguments) -> tuple[LearnerInputs, Any, dict[str, Any]]:
    """What `learn` takes, with rates and gates as a trained layer has them."""
    shapes = input_shapes(learner, a.time, a.head_dim, a.head_dim)
    key, count = jax.random.key(0), 0
    optimizer = learner.optimizer

    def draw(shape: Any, make: Callable) -> Any:
        nonlocal count
        count += 1
        batched = (a.batch, shape.shape[1], a.num_heads, *shape.shape[3:])
        return make(jax.random.fold_in(key, count), batched, jnp.float32)

    def uniform(low: float, high: float) -> Callable:
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)

    def unit(key: Any, shape: Any, dtype: Any) -> Any:
        x = jax.random.normal(key, shape, dtype)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def gate(one: Any) -> Callable:
        ranges = {factor: (0.8, 1.0), one_minus: (0.0, 0.05), jnp.exp: (-0.05, 0.0)}
        return uniform(*ranges.get(one.activation, (-1.0, 1.0))) if one else unit

    makes = {"queries": unit, "keys": unit, "values": jax.random.normal, "error_keys": unit}
    makes |= {"rates": uniform(0.0, 0.02), "step_size": uniform(0.0, 0.02)}
    makes |= {"decay": gate(optimizer.decay), "momentum": gate(getattr(optimizer, "momentum", None))}
    inputs = LearnerInputs(
        **{
            name: jax.tree.map(lambda shape, name=name: draw(shape, makes[name]), tree)
            for name, tree in shapes._asdict().items()
        }
    )
    options: dict[str, Any] = {}
    if isinstance(optimizer, Ridge):
        weights = initial_weights(learner, a.num_heads, a.head_dim, a.head_dim)
        weights = jax.tree.map(lambda w: jnp.zeros(w.shape), weights)
        return inputs, weights, {"slow": jnp.ones((a.num_heads, a.head_dim))}
    weights = learner.model.init(key, a.num_heads, a.head_dim, a.head_dim)
    if hasattr(learner.model, "init_slow"):
        options["slow"] = learner.model.init_slow(a.num_heads, a.head_dim)
    if optimizer.position_scale:
        options["position_scale"] = 1 / jnp.arange(1, a.chunk_size + 1, dtype=jnp.float32)
    return inputs, weights, options


def compiled(learners: tuple[Learner, ...], a: Arguments, backward: bool) -> Callable[[], Any]:
    """A call of no arguments."""
    arguments = [random_arguments(learner, a) for learner in learners]

    def value(arguments: Any) -> jax.Array:
        pairs = zip(learners, arguments, strict=True)
        return jnp.sum(jnp.square(sum(learn(one, x, w, **options)[0] for one, (x, w, options) in pairs)))

    run = jax.jit(jax.value_and_grad(value) if backward else value)
    return lambda: run(arguments)


def main(arguments: Arguments) -> None:
    """Times and prints."""
    a = arguments
    every = descriptions(a.head_dim, a.chunk_size)
    chosen = {name: every[name] for name in (BASE, *(a.learners or [n for n in every if n != BASE]))}
    shapes = Shapes(a.batch, a.time, a.num_heads, a.head_dim, a.head_dim)
    flops = {n: sum(flops_per_token(one, a.head_dim, a.head_dim, a.time) for one in many) for n, many in chosen.items()}
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(f"B={a.batch} T={a.time} num_heads={a.num_heads} head_dim={a.head_dim} chunk_size={a.chunk_size}, float32\n")
    times = {}
    for what in a.passes:
        runs = {name: compiled(many, a, what != "forward") for name, many in chosen.items()}
        times[what] = interleaved(runs, a.repeats)
        print(f"{what}: {times[what][BASE] * 1e3:.1f} ms for {BASE}, load {os.getloadavg()[0]:.1f}\n", flush=True)
    print(f"| learner | implementation | products and sums | {' | '.join(a.passes)} |")
    print("|---|---|" + "---|" * (1 + len(a.passes)))
    for name, many in chosen.items():
        picked = {next(how for how, reason in supported(one, shapes).items() if reason is None) for one in many}
        ratios = [f"{times[what][name] / times[what][BASE]:.2f}" for what in a.passes]
        print(f"| {name} | {', '.join(sorted(picked))} | {flops[name] / flops[BASE]:.2f} | {' | '.join(ratios)} |")


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, called in turn after a first call that compiles."""
    for key, run in runs.items():
        print(f"compiling {key}", file=sys.stderr, flush=True)
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - start)
    return {key: median(values) for key, values in seconds.items()}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
