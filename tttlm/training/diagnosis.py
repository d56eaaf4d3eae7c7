"""What went wrong in a step: its batch is run again layer by layer, until something is not finite."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.training.config import TrainConfig
from tttlm.training.loss import token_losses
from tttlm.training.optimizer import inner_multiplier
from tttlm.training.sharding import path_name
from tttlm.training.step import Model, batch_gradient

Batch = dict[str, Array]


def diagnose(config: TrainConfig, model: Model, params: Any, batch: Batch, step: int) -> str:
    """Names the first thing that is not finite when `batch` is run with `params`: a parameter, the activations or
    the state of a layer, the loss of a token, or the gradient of a parameter; else the largest gradient.

    Args:
        step: the update, counted from 1, that went wrong.
    """
    multiplier = inner_multiplier(config, step - 1)
    found = (
        _in_tree(params, "parameter {}")
        or _in_layers(config, model, params, batch, multiplier)
        or _in_gradients(config, model, params, batch, multiplier)
    )
    return found


def _in_layers(config: TrainConfig, model: Model, params: Any, batch: Batch, multiplier: Array) -> str:
    bound, tokens, segments = model.bind(params), batch["inputs"], batch.get("segment_ids")
    h = bound.embed(tokens)
    graph, stack = nnx.split(bound.stack)
    mixers = config.model.mixers
    for repeat in range(config.model.repeats):
        pattern = jax.tree.map(lambda x, repeat=repeat: x[repeat], stack)
        for place, mixer in enumerate(mixers):
            name = f"layer {repeat * len(mixers) + place} ({mixer})"
            h, state = _block(graph, place, pattern, h, segments, multiplier)
            found = _in_tree(state, f"the state of {name}, {{}},")
            if found or not bool(jnp.isfinite(h).all()):
                return found or f"the activations of {name} are the first that are not finite{_where(h)}"
    losses = token_losses(bound.head(bound.norm(h)), batch["targets"])
    return "" if bool(jnp.isfinite(losses).all()) else f"the loss is not finite{_where(losses)}"


@partial(jax.jit, static_argnums=(0, 1))
def _block(
    graph: Any,
    place: int,
    pattern: Any,
    h: Float[Array, "B T D"],
    segments: Int[Array, "B T"] | None,
    multiplier: Float[Array, ""],
) -> tuple[Array, Any]:
    block = nnx.merge(graph, pattern).blocks[place]
    return block(h, block.init_state(h.shape[0]), segments, multiplier)


def _in_gradients(config: TrainConfig, model: Model, params: Any, batch: Batch, multiplier: Array) -> str:
    _, _, grads = jax.jit(partial(batch_gradient, config, model))(params, batch, multiplier)
    if found := _in_tree(grads, "every activation is finite; the gradient of {}"):
        return found
    norms = {path_name(path): float(jnp.linalg.norm(g)) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    largest = max(norms, key=lambda name: norms[name])
    return f"everything is finite; the largest gradient is of {largest} (norm {norms[largest]:.3g})"


def _in_tree(tree: Any, name: str) -> str:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
            return f"{name.format(path_name(path))} is the first that is not finite"
    return ""


def _where(x: Array) -> str:
    """The first row and token of `[B, T, ...]` that is not finite."""
    bad = np.asarray(~jnp.isfinite(x).all(axis=tuple(range(2, x.ndim))))
    row, token = np.argwhere(bad)[0]
    return f", from row {row}, token {token} on"
