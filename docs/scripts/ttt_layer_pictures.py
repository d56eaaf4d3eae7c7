"""Draws the pictures of docs/ttt-layer.md: python docs/scripts/ttt_layer_pictures.py [FOLDER]

The learning curves are computed by `tttlm.ops.ttt.learn`; the diagram is drawn by hand.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tttlm.ops.ttt import Clocks, Learner, LearnerInputs, Optimizer, init_learner_state, learn
from tttlm.ops.ttt.state import InnerLayer

BLUE, ORANGE, GRAY = "#3f51b5", "#e65100", "#777777"
TASK, TASKS, SEQUENCES, SIZE = 96, 3, 32, 8  # tokens of a task, tasks in a row, sequences, width of keys and values


def main(folder: Path) -> None:
    for name, draw in {"ttt-layer": diagram, "ttt-layer-learning": learning}.items():
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)


def diagram() -> Figure:
    """A sequence of tokens, and the weights that are trained from one to the next."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.set(xlim=(-0.9, 8.3), ylim=(-0.5, 3.5))
    axes.axis("off")
    arrow = lambda start, end, color=GRAY: axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 1.6}
    )
    _box(axes, 0, 1.5, "$W_0$", BLUE)
    for t in (1, 2, 3):
        x = 2.4 * t
        _box(axes, x, 0, f"$x_{t}$", GRAY)
        _box(axes, x, 1.5, f"$W_{t}$", BLUE)
        _box(axes, x, 3, f"$z_{t}$", ORANGE)
        arrow((x - 2, 1.5), (x - 0.4, 1.5), BLUE)
        arrow((x, 0.35), (x, 1.15))
        arrow((x, 1.85), (x, 2.65), ORANGE)
        axes.text(x - 1.2, 1.62, "one step of\ntraining", ha="center", va="bottom", fontsize=8, color=BLUE)
        axes.text(x + 0.1, 0.75, "key and target", va="center", fontsize=8, color=GRAY)
        axes.text(x + 0.1, 2.25, "query", va="center", fontsize=8, color=ORANGE)
    axes.text(-0.8, 0, "input", va="center", color=GRAY)
    axes.text(-0.8, 3, "output", va="center", color=ORANGE)
    return figure


def _box(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    style = {"boxstyle": "round,pad=0.35", "fc": "white", "ec": color, "lw": 1.6}
    axes.text(x, y, text, ha="center", va="center", fontsize=13, bbox=style)


def learning() -> Figure:
    """The inner loss of every token, before the weights have learned from it, for two sizes of mini-batches."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for mini_batch_size, color in ((1, BLUE), (16, ORANGE)):
        losses = inner_losses(mini_batch_size)
        axes.plot(np.arange(1, len(losses) + 1), losses, color=color, lw=1.4, label=f"mini-batch of {mini_batch_size}")
    for start in range(TASK, TASK * TASKS, TASK):
        axes.axvline(start, color=GRAY, lw=0.8, ls=":")
    axes.set(xlabel="token", ylabel="inner loss of the next token", yscale="log", xlim=(1, TASK * TASKS))
    axes.legend(frameon=False)
    return figure


def inner_losses(mini_batch_size: int) -> np.ndarray:
    """The mean over sequences of `|W_{t-1} k_t - v_t|^2 / 2`; values are another linear map of keys in every task."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    keys = draw(0, SEQUENCES, TASKS, TASK, 1, SIZE) / SIZE**0.5
    values = jnp.einsum("bntik,bnkv->bntiv", keys, draw(1, SEQUENCES, TASKS, SIZE, SIZE))
    keys, values = (a.reshape(SEQUENCES, TASK * TASKS, 1, SIZE) for a in (keys, values))
    learner = Learner(optimizer=Optimizer(), clocks=Clocks(anchor=mini_batch_size))
    weights = (InnerLayer(jnp.zeros((1, SIZE, SIZE)), None),)
    rates = jnp.full((SEQUENCES, TASK * TASKS, 1), 0.5)

    def step(state, token):
        k, v = (a[:, None] for a in token)
        unlearned = LearnerInputs(k, k, v, jnp.zeros_like(rates[:, :1]))  # only reads the weights
        predicted, _ = learn(learner, unlearned, weights, state=state)
        _, state = learn(learner, LearnerInputs(k, k, v, rates[:, :1]), weights, state=state)
        return state, 0.5 * jnp.mean(jnp.sum((predicted - v) ** 2, axis=-1))

    state = init_learner_state(learner, weights, SEQUENCES, SIZE, SIZE)
    _, losses = jax.lax.scan(step, state, (keys.swapaxes(0, 1), values.swapaxes(0, 1)))
    return np.asarray(losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
