"""A Transformer in Flax NNX whose attention is replaced by TTT-Linear: one line of the block.

It learns to copy: the second half of a sequence repeats the first.   $ python examples/transformer.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from tttlm import TTTLinear


class Block(nnx.Module):
    def __init__(self, hidden_size: int, num_heads: int, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.RMSNorm(hidden_size, rngs=rngs) for _ in range(2))
        # before: nnx.MultiHeadAttention(num_heads, hidden_size, decode=False, rngs=rngs), with a causal mask
        self.mix = TTTLinear(hidden_size, num_heads, mini_batch_size=4, rngs=rngs)
        self.up = nnx.Linear(hidden_size, 4 * hidden_size, rngs=rngs)
        self.down = nnx.Linear(4 * hidden_size, hidden_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.mix(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    def __init__(self, vocab_size: int, hidden_size: int, num_heads: int, num_layers: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab_size, hidden_size, rngs=rngs)
        self.blocks = nnx.List(Block(hidden_size, num_heads, rngs=rngs) for _ in range(num_layers))
        self.head = nnx.Linear(hidden_size, vocab_size, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@nnx.jit
def train_step(model: Transformer, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss(model: Transformer) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def main(steps: int = 300, hidden_size: int = 64, num_layers: int = 2) -> list[float]:
    model = Transformer(16, hidden_size, 4, num_layers, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        half = jax.random.randint(key, (16, 16), 0, 16)
        losses.append(float(train_step(model, optimizer, jnp.concatenate([half, half], axis=1))))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
