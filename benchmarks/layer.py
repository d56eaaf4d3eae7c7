"""How fast one TTT layer is: forward, and forward with backward, on whatever JAX runs on here.

    python benchmarks/layer.py                                # TTT-Linear and TTT-MLP at 125M size
    python benchmarks/layer.py --official PATH/TO/ttt-lm-jax  # the official JAX layer beside it, in the same process

Layers are timed in turn, A B A B ..., so that a drift of the machine meets all of them; medians are printed.
"""

import importlib.util
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from tttlm.layers import TTTMLP, TTTLinear
from tttlm.model import ModelConfig


@dataclass(frozen=True)
class Arguments:
    """Times one TTT layer."""

    layers: tuple[Literal["ttt_linear", "ttt_mlp"], ...] = ("ttt_linear", "ttt_mlp")
    backbone: Literal["transformer", "mamba"] = "mamba"
    batch: int = 2
    time: int = 2048
    hidden_size: int = 768
    num_heads: int = 12
    mini_batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    repeats: int = 7
    """Timed calls of each; the median counts."""
    official: Path | None = None
    """A clone of the official JAX code, to time its layer beside ours."""


def main(arguments: Arguments) -> None:
    """Times and prints."""
    a = arguments
    x = jax.random.normal(jax.random.key(0), (a.batch, a.time, a.hidden_size), a.dtype)
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in a.layers:
        forwards = {"tttlm": ours(a, name)}
        if a.official is not None:
            forwards["official"] = official(a, name)
        for who, (forward, parameters) in forwards.items():
            value = jax.jit(lambda p, x, f=forward: f(p, x))
            gradient = jax.jit(
                jax.grad(lambda p, x, f=forward: jnp.sum(jnp.square(f(p, x)), dtype=jnp.float32), (0, 1))
            )
            runs[f"{name} forward", who] = lambda f=value, p=parameters: f(p, x)
            runs[f"{name} forward+backward", who] = lambda f=gradient, p=parameters: f(p, x)
    times = interleaved(runs, a.repeats)
    peak = matmul_peak(a.dtype)

    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind}); matmul {peak / 1e9:.0f} GFLOP/s")
    print(
        f"B={a.batch} T={a.time} hidden_size={a.hidden_size} num_heads={a.num_heads} "
        f"mini_batch_size={a.mini_batch_size} {a.dtype} {a.backbone}"
    )
    for (what, who), seconds in times.items():
        config = ModelConfig(
            hidden_size=a.hidden_size,
            num_heads=a.num_heads,
            mixers=(what.split()[0],),
            backbone=a.backbone,
            num_layers=1,  # type: ignore[arg-type]
        )
        flops = config.pattern[0].flops_per_token(a.time) * a.batch * a.time
        flops *= 3 if what.endswith("backward") else 1
        line = f"{what:28} {who:9} {seconds * 1e3:8.1f} ms {a.batch * a.time / seconds:10.0f} tokens/s"
        line += f" {flops / seconds / peak:6.1%} of peak"
        if who == "tttlm" and (what, "official") in times:
            line += f"   {seconds / times[what, 'official']:.1%} of the official layer's time"
        print(line)


def ours(a: Arguments, name: str) -> tuple[Callable, Any]:
    """Our layer as a function of its parameters, and those."""
    layer = {"ttt_linear": TTTLinear, "ttt_mlp": TTTMLP}[name]
    mamba = a.backbone == "mamba"
    module = layer(
        a.hidden_size,
        a.num_heads,
        mini_batch_size=a.mini_batch_size,
        share_qk=mamba,
        gate=mamba,
        dtype=jnp.dtype(a.dtype),
        rngs=nnx.Rngs(0),
    )
    graph, parameters = nnx.split(module)
    return lambda p, x: nnx.merge(graph, p)(x), parameters


def official(a: Arguments, name: str) -> tuple[Callable, Any]:
    """The official layer from a clone; what it imports of the clone's trainer is not needed here and left empty."""
    path = a.official / "ttt" / "models" / "ttt_layer.py"
    if not path.exists():
        sys.exit(f"error: {path} does not exist; --official wants a clone of the official JAX code")
    stub: Any = types.ModuleType("ttt.infra.jax_utils")
    stub.with_sharding_constraint = lambda x, spec: x
    stub.get_gradient_checkpoint_policy = lambda name: None
    sys.modules.update({"ttt": types.ModuleType("ttt"), "ttt.infra": types.ModuleType("ttt.infra")})
    sys.modules["ttt.infra.jax_utils"] = stub
    spec = importlib.util.spec_from_file_location("official_ttt_layer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.jnp = OlderNumpy()  # type: ignore[attr-defined]
    config = types.SimpleNamespace(
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        mini_batch_size=a.mini_batch_size,
        max_sequence_length=a.time,
        rope_theta=10_000.0,
        initializer_range=0.02,
        ttt_base_lr=1.0 if name == "ttt_linear" else 0.1,
        remat_mini_batch_group_size=4,
        remat_conv="",
        conv_kernel=4,
        output_ttt_stats=False,
    )
    suffix = "" if a.backbone == "mamba" else "Base"
    layer = getattr(module, {"ttt_linear": "TTTLinear", "ttt_mlp": "TTTMLP"}[name] + suffix)
    layer = layer(config, dtype=jnp.dtype(a.dtype))
    positions = jnp.arange(a.time)[None].repeat(a.batch, 0)
    x = jnp.zeros((a.batch, a.time, a.hidden_size), a.dtype)
    parameters = jax.jit(lambda: layer.init(jax.random.key(0), x, position_ids=positions))()
    return lambda p, x: layer.apply(p, x, position_ids=positions)[0], parameters


class OlderNumpy:
    """`jax.numpy` as the official code knew it: `clip` with `a_min`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(x: jax.Array, a_min: float) -> jax.Array:
        return jnp.clip(x, min=a_min)


def interleaved(runs: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """Median seconds of each, called in turn after a first call that compiles."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - start)
    return {key: median(values) for key, values in seconds.items()}


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    n = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


if __name__ == "__main__":
    main(tyro.cli(Arguments))
