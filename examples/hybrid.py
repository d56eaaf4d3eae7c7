"""A hybrid language model: attention to the last few tokens alternates with TTT layers, whose memory reaches further.

It learns to go on with a pattern that is longer than the window of attention, and then writes one token by token.
$ python examples/hybrid.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import tttlm
from tttlm.inference import generate
from tttlm.mixers import AttentionConfig, TTTConfig


@nnx.jit
def train_step(model: tttlm.LanguageModel, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss(model: tttlm.LanguageModel) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def patterns(key: jax.Array, batch: int) -> jax.Array:
    return jnp.tile(jax.random.randint(key, (batch, 8), 0, 16), 6)


def main(steps: int = 300, hidden_size: int = 64) -> list[float]:
    config = tttlm.ModelConfig(
        vocab_size=16,
        hidden_size=hidden_size,
        num_layers=2,
        num_heads=4,
        intermediate_size=2 * hidden_size,
        mixers=("sliding_attention", "ttt_linear"),  # repeated over the depth
        attention=AttentionConfig(sliding_window=4),
        ttt=TTTConfig(mini_batch_size=4),
    )
    model = tttlm.LanguageModel(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), steps)
    losses = [float(train_step(model, optimizer, patterns(key, 16))) for key in keys]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    tokens = patterns(jax.random.key(2), 1)[0].tolist()
    written = generate(model, tokens[:32], max_tokens=16, temperature=0.0)[0].tokens
    print(f"{sum(a == b for a, b in zip(tokens[32:], written, strict=True))} of 16 generated tokens are right")
    return losses


if __name__ == "__main__":
    main()
