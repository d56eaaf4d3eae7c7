"""The same in Flax Linen: the block's attention is `tttlm.linen.TTTLinear`.   $ python examples/linen_transformer.py"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tttlm.linen import TTTLinear


class Block(nn.Module):
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden_size = x.shape[-1]
        # before: nn.SelfAttention(self.num_heads), with a causal mask
        x = x + TTTLinear(hidden_size, self.num_heads, mini_batch_size=4, name="ttt")(nn.RMSNorm()(x))
        return x + nn.Dense(hidden_size)(nn.gelu(nn.Dense(4 * hidden_size)(nn.RMSNorm()(x))))


class Transformer(nn.Module):
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.hidden_size)(tokens)
        for _ in range(self.num_layers):
            x = Block(self.num_heads)(x)
        return nn.Dense(self.vocab_size)(x)


def main(steps: int = 300, hidden_size: int = 64, num_layers: int = 2) -> list[float]:
    model, optimizer = Transformer(16, hidden_size, 4, num_layers), optax.adamw(3e-3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    opt_state = optimizer.init(variables)

    @jax.jit
    def train_step(variables: dict, opt_state: optax.OptState, tokens: jax.Array) -> tuple:
        def loss(variables: dict) -> jax.Array:
            logits = model.apply(variables, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradient = jax.value_and_grad(loss)(variables)
        updates, opt_state = optimizer.update(gradient, opt_state, variables)
        return value, optax.apply_updates(variables, updates), opt_state

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        half = jax.random.randint(key, (16, 16), 0, 16)
        value, variables, opt_state = train_step(variables, opt_state, jnp.concatenate([half, half], axis=1))
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
