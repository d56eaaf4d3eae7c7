"""How long a prompt and a token take, and how much memory a state, against context and batch, for every mixer.

    python benchmarks/latency.py                                       # 125M models
    python benchmarks/latency.py --hidden_size 256 --num_layers 4 --contexts 1024 16384 131072 --output runs/latency

What is compared is timed in turn: a prompt in chunks and in one call; a step after each context, and the reading of all
weights once, which no decoding of one sequence can be much faster than. Medians are printed; `latency.json` has all
numbers and `latency.png` the picture.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from tttlm.inference import begin, read, with_room_for
from tttlm.inference.stepping import stepping
from tttlm.model import LanguageModel, ModelConfig


@dataclass(frozen=True)
class Arguments:
    """Times reading and decoding."""

    mixers: tuple[str, ...] = ("ttt_linear", "ttt_mlp", "attention", "sliding_attention", "mamba", "mamba2")
    hidden_size: int = 768
    num_layers: int = 12
    vocab_size: int = 32_000
    contexts: tuple[int, ...] = (1024, 4096, 16384)
    """Tokens that are read before tokens are drawn."""
    batches: tuple[int, ...] = (1,)
    chunk: int = 2048
    """Tokens of a prompt that are read at a time."""
    steps: int = 16
    """Tokens that are drawn."""
    repeats: int = 3
    """Number of times that a prompt is read."""
    dtype: str = "float32"
    output: Path = Path("runs/latency")


@dataclass(frozen=True)
class Row:
    """What was measured of one mixer, batch and context.

    Attributes:
        prefill_ms: Time of a token of the prompt, read in chunks, for each sequence.
        whole_ms: The same for one call on the whole prompt.
        decode_ms: Time of a step, which draws the most likely token for each sequence and reads it.
        weights_ms: Time of reading all weights once.
        state_bytes: Bytes of the state of one sequence with room for the context.
    """

    mixer: str
    batch: int
    context: int
    prefill_ms: float
    whole_ms: float
    decode_ms: float
    weights_ms: float
    state_bytes: int


def main(arguments: Arguments) -> None:
    """Measures, prints and draws."""
    rows = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, jax {jax.__version__}, {arguments.dtype}")
    columns = "".join(f" {name:>9}" for name in ("prefill", "whole", "decode", "weights", "state"))
    print(f"{'mixer':18} {'batch':>5} {'context':>8}{columns}")
    for mixer in arguments.mixers:
        for row in measure(arguments, mixer):
            rows.append(row)
            print(
                f"{row.mixer:18} {row.batch:5} {row.context:8,} {row.prefill_ms:6.3f} ms {row.whole_ms:6.3f} ms"
                f" {row.decode_ms:6.2f} ms {row.weights_ms:6.2f} ms {row.state_bytes / 1e6:6.2f} MB",
                flush=True,
            )
            record = {"arguments": asdict(arguments), "device": device.device_kind, "rows": [asdict(r) for r in rows]}
            (arguments.output / "latency.json").write_text(json.dumps(record, default=str, indent=1))
    draw(rows, arguments.output / "latency.png")


def measure(arguments: Arguments, mixer: str) -> Iterator[Row]:
    """Times one mixer for every batch and context."""
    a = arguments
    preset = ModelConfig.preset("125m", mixer=mixer)
    config = replace(
        preset,
        hidden_size=a.hidden_size,
        num_layers=a.num_layers * preset.num_layers // 12,
        num_heads=max(1, a.hidden_size // 64),
        intermediate_size=preset.intermediate_size and a.hidden_size * 8 // 3,
        vocab_size=a.vocab_size,
        dtype=a.dtype,
        param_dtype=a.dtype,
    )
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
    weights = reader(model)
    for batch in a.batches:
        steppers: dict[str, Any] = {}
        prompts = [prefilled(a, model, batch, context, steppers) for context in a.contexts]
        steps = [step for _, _, step in prompts]
        *decode, weights_s = in_turn([*steps, weights], a.steps)
        for context, (of_chunks, whole, _), decode_s in zip(a.contexts, prompts, decode, strict=True):
            yield Row(
                mixer=mixer,
                batch=batch,
                context=context,
                prefill_ms=1e3 * of_chunks / context,
                whole_ms=1e3 * whole / context,
                decode_ms=1e3 * decode_s,
                weights_ms=1e3 * weights_s,
                state_bytes=with_room_for(model, room_for(a, context)).config.state_bytes,
            )


def room_for(a: Arguments, context: int) -> int:
    """Tokens that a cache has room for: the context and what is drawn, in complete chunks."""
    return -(-(context + 2 * a.steps) // a.chunk) * a.chunk


def prefilled(
    a: Arguments, model: LanguageModel, batch: int, context: int, steppers: dict[str, Any]
) -> tuple[float, float, Callable[[], jax.Array]]:
    """Seconds of reading a prompt in chunks and in one call, and a step that continues from it.

    Steps whose states have equal shapes share one of `steppers`: two copies of the weights differ in speed by where
    they lie in memory.
    """
    model = with_room_for(model, room_for(a, context))
    tokens = np.random.default_rng(0).integers(0, a.vocab_size, (batch, context))
    calls = (
        lambda: read(model, begin(model, batch), tokens, chunk=a.chunk).logits,
        lambda: last_logits(model, jnp.asarray(tokens)),
    )
    of_chunks, whole = in_turn(calls, a.repeats)
    reading = read(model, begin(model, batch), tokens, chunk=a.chunk)
    own = stepping(model, reading.state)
    advance = steppers.setdefault(str(jax.eval_shape(lambda: reading.state)), own)
    drawn, state = jnp.argmax(reading.logits, axis=-1), own.state

    def step() -> jax.Array:
        nonlocal drawn, state
        advance.state = state
        drawn = jnp.argmax(advance(drawn, None), axis=-1)
        state = advance.state
        return drawn

    return of_chunks, whole, step


def in_turn(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call; rounds are shuffled, as a call finds in caches what the last left."""
    for call in calls:
        jax.block_until_ready(call())  # compiles
    times: list[list[float]] = [[] for _ in calls]
    order = list(zip(calls, times, strict=True))
    shuffled = np.random.default_rng(0)
    for _ in range(repeats):
        for at in shuffled.permutation(len(order)):
            call, of_call = order[at]
            of_call.append(timed(call))
    return [median(of_call) for of_call in times]


def reader(model: LanguageModel) -> Callable[[], Any]:
    """Reads all weights once: on a CPU by a thread for each core, elsewhere by a sum."""
    leaves = jax.tree.leaves(nnx.state(model))
    if jax.default_backend() != "cpu":
        read_all = jax.jit(lambda leaves: sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves))
        return lambda: read_all(leaves)
    bits = [np.asarray(leaf).reshape(-1).view(np.int32) for leaf in leaves]
    parts = [part for leaf in bits for part in np.array_split(leaf, max(1, leaf.nbytes >> 20))]
    threads = ThreadPoolExecutor(os.cpu_count())
    return lambda: list(threads.map(np.max, parts))


@nnx.jit
def last_logits(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """The logits after one call on whole sequences."""
    return model.head(model.features(tokens)[:, -1])


def timed(call: Any) -> float:
    """Seconds that a call takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def draw(rows: list[Row], png: Path) -> None:
    """Prefill and decoding time of a token, and the state, against the context; batches apart by style."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 3)
    names = list(dict.fromkeys(row.mixer for row in rows))
    labels = {
        "prefill_ms": "prefill, ms per token",
        "decode_ms": "decoding, ms per step",
        "state_bytes": "state of one sequence, bytes",
    }
    for axes, (field, label) in zip(panels, labels.items(), strict=True):
        for mixer, batch in dict.fromkeys((row.mixer, row.batch) for row in rows):
            line = [row for row in rows if (row.mixer, row.batch) == (mixer, batch)]
            axes.plot(
                [row.context for row in line],
                [getattr(row, field) for row in line],
                "-" if batch == rows[0].batch else "--",
                color=f"C{names.index(mixer)}",
                marker="o",
                label=f"{mixer}, batch {batch}",
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens read before", ylabel=label)
        axes.set_xticks(sorted({row.context for row in rows}))
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(png, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
