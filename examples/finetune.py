"""Finetunes a released model on a text, and writes it in the layout that it came in.

$ python examples/finetune.py FOLDER TEXT_FILE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tttlm
from tttlm.data import load_tokenizer


@nnx.jit
def train_step(model: tttlm.LanguageModel, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss(model: tttlm.LanguageModel) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def main(
    folder: str, text: str, output: str, *, steps: int = 100, batch: int = 4, time: int = 512, rate: float = 1e-4
) -> list[float]:
    model = tttlm.from_pretrained(folder)  # or "owner/name" of the Hugging Face hub
    tokens = np.asarray(load_tokenizer(folder).encode(Path(text).read_text(encoding="utf-8")), np.int32)
    optimizer = nnx.Optimizer(model, optax.adamw(optax.cosine_decay_schedule(rate, steps)), wrt=nnx.Param)
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        starts = rng.integers(0, len(tokens) - time, batch)
        windows = jnp.asarray([tokens[start : start + time + 1] for start in starts])
        losses.append(float(train_step(model, optimizer, windows)))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    tttlm.save_pretrained(model, output)  # with the tokenizer's files
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:4])
