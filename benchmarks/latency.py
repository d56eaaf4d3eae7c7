"""How long a prompt and a token take, and how much memory a state, against context and batch, for every mixer.

    python benchmarks/latency.py                                       # 125M models
    python benchmarks/latency.py --hidden_size 256 --num_layers 4 --contexts 1024 16384 131072 --output runs/latency

Beside the time of a token stands that of reading all weights once, which no decoding of one sequence can be faster
than. Medians are printed; `latency.json` has all numbers and `latency.png` the picture.
"""

import json
import time
from collections.abc import Iterator
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
from matplotlib.ticker import EngFormatter

from tttlm.inference import Sampling, begin, decoding, read, with_room_for
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
    """Tokens that are drawn; the median counts."""
    dtype: str = "float32"
    output: Path = Path("runs/latency")


@dataclass(frozen=True)
class Row:
    """What was measured of one mixer, batch and context.

    Attributes:
        prefill_ms: Time of a token of the prompt, read in chunks, for each sequence.
        whole_ms: The same for one call on a whole sequence of at most 16,384 tokens.
        decode_ms: Time of a step, which draws a token for each sequence.
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
    for batch in a.batches:
        for context in a.contexts:
            yield measure_at(a, mixer, model, batch, context)


def measure_at(a: Arguments, mixer: str, model: LanguageModel, batch: int, context: int) -> Row:
    """Times one mixer for one batch and context."""
    room = -(-(context + 2 * a.steps) // a.chunk) * a.chunk
    model = with_room_for(model, room)
    tokens = np.random.default_rng(0).integers(0, a.vocab_size, (batch, context))
    whole, prefill = [], []
    for _ in range(2 if context > 16_384 else 4):  # the first call compiles; in turn, whole and in chunks
        prefill.append(timed(lambda: read(model, begin(model, batch), tokens, chunk=a.chunk).logits))
        whole.append(timed(lambda: last_logits(model, jnp.asarray(tokens[:, :16_384]))))
    reading = read(model, begin(model, batch), tokens, chunk=a.chunk)
    decode, weights = stepped(model, reading, a.steps)
    return Row(
        mixer=mixer,
        batch=batch,
        context=context,
        prefill_ms=1e3 * median(prefill[1:]) / context,
        whole_ms=1e3 * median(whole[1:]) / min(context, 16_384),
        decode_ms=1e3 * decode,
        weights_ms=1e3 * weights,
        state_bytes=model.config.state_bytes,
    )


def stepped(model: LanguageModel, reading: Any, steps: int) -> tuple[float, float]:
    """Medians of the time of a step, and of reading all weights once."""
    params = jax.tree.leaves(nnx.state(model))
    read_all = jax.jit(lambda params: sum(jnp.sum(p, dtype=jnp.float32) for p in params))
    read_all(params).block_until_ready()
    forked = reading.take(list(range(len(reading))))
    drawn = decoding.decode(
        model,
        forked,
        Sampling(temperature=0.0),
        max_tokens=steps + 2,
        ends=(),
        samples=[0] * len(reading),
        vocab_size=model.config.vocab_size,
        stopped=np.zeros(len(reading), bool),
    )
    next(drawn)  # compiles, and from here on one step is always under way
    step_times = []
    weight_times = [timed(lambda: read_all(params)) for _ in range(steps)][1:]  # the first waits for that step
    for _ in range(steps):
        start = time.perf_counter()
        next(drawn)
        step_times.append(time.perf_counter() - start)
    return median(step_times[1:]), median(weight_times)


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
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(png, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
