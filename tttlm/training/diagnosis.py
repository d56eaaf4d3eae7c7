"""Diagnosis of a faulty step: its batch is run again layer by layer to find the first value that is not finite."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from tttlm.data import Batch
from tttlm.ops.ttt import InnerStatistics
from tttlm.training.carried import continued_state
from tttlm.training.config import TrainConfig
from tttlm.training.loss import token_losses
from tttlm.training.optimizer import inner_multiplier
from tttlm.training.sharding import path_name
from tttlm.training.step import Model, batch_gradient


def diagnose(config: TrainConfig, model: Model, params: Any, batch: Batch[Array], step: int, carried: Any = ()) -> str:
    """Names the first value that is not finite when `batch` is run with `params`: a parameter; the state, the inner
    loss or the activations of a layer; the loss of a token; the gradient of a parameter. If all are finite, names
    the largest gradient, and the first layer whose inner loss grows in its update. Must be called within
    `jax.set_mesh` of the training step's mesh.

    Args:
        step: the faulty update, counted from 1.
        carried: the state that the batch continues from; () if none is carried.
    """
    multiplier = inner_multiplier(config, step - 1)
    if problem := _in_tree(params, "parameter {}"):
        return problem
    problem, growing = _in_layers(config, model, params, batch, multiplier, carried)
    return problem or _in_gradients(config, model, params, batch, multiplier, carried) + growing


def _in_layers(
    config: TrainConfig, model: Model, params: Any, batch: Batch[Array], multiplier: Array, carried: Any
) -> tuple[str, str]:
    """The first that is not finite, and the first inner loss that grows; "" where there is none."""
    bound, tokens, segments = model.bind(params), batch.inputs, batch.segment_ids
    h = bound.embedded(tokens)
    graph, stack = nnx.split(bound.stack)
    run = jax.jit(_block, static_argnums=(0, 1))
    mixers, growing = config.model.mixers, ""
    before = continued_state(bound, carried, batch.continues) if carried else None
    for repeat in range(config.model.repeats):
        pattern = jax.tree.map(lambda x, repeat=repeat: x[repeat], stack)
        for index, mixer in enumerate(mixers):
            name = f"layer {repeat * len(mixers) + index} ({mixer})"
            layer_state = None if before is None else jax.tree.map(lambda x, repeat=repeat: x[repeat], before[index])
            h, state, inner = run(graph, index, pattern, h, layer_state, segments, multiplier)
            if problem := _in_tree(state, f"the state of {name}, {{}},"):
                return problem, growing
            if inner is not None:
                first, last = float(inner.loss_before), float(inner.loss_after)
                if not np.isfinite([first, last]).all():
                    return f"the inner loss of {name} is the first that is not finite", growing
                if last > first and not growing:
                    growing = f"; the inner loss of {name} grows in its update, from {first:.3g} to {last:.3g}"
            if not bool(jnp.isfinite(h).all()):
                return f"the activations of {name} are the first that are not finite{_where(h)}", growing
    hidden, chunk = bound.norm(h), config.loss_chunk or h.shape[1]
    pieces = [slice(start, start + chunk) for start in range(0, h.shape[1], chunk)]
    losses = jnp.concatenate(
        [token_losses(bound.head(hidden[:, piece]), batch.targets[:, piece]) for piece in pieces], axis=1
    )
    return "" if bool(jnp.isfinite(losses).all()) else f"the loss is not finite{_where(losses)}", growing


def _block(
    graph: Any,
    index: int,
    pattern: Any,
    h: Float[Array, "B T D"],
    state: Any,
    segments: Int[Array, "B T"] | None,
    multiplier: Float[Array, ""],
) -> tuple[Array, Any, InnerStatistics | None]:
    block = nnx.merge(graph, pattern).blocks[index]
    inner = block.inner_statistics(h, segments, multiplier)
    state = block.init_state(h.shape[0]) if state is None else state
    return *block(h, state, segments, multiplier), inner


def _in_gradients(
    config: TrainConfig, model: Model, params: Any, batch: Batch[Array], multiplier: Array, carried: Any
) -> str:
    _, _, grads, _ = jax.jit(partial(batch_gradient, config, model))(params, batch, multiplier, carried)
    if problem := _in_tree(grads, "every activation is finite; the gradient of {}"):
        return problem
    norms = {path_name(path): float(jnp.linalg.norm(g)) for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    largest = max(norms, key=lambda name: norms[name])
    return f"everything is finite; the largest gradient is of {largest} (norm {norms[largest]:.3g})"


def _in_tree(tree: Any, name: str) -> str:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all()):
            return f"{name.format(path_name(path))} is the first that is not finite"
    return ""


def _where(x: Array) -> str:
    """The first sequence and token of `[B, T, ...]` that is not finite."""
    bad = ~jnp.isfinite(x).all(axis=tuple(range(2, x.ndim)))
    here = multihost_utils.process_allgather(bad, tiled=True) if jax.process_count() > 1 else np.asarray(bad)
    sequence, token = np.argwhere(here)[0]
    return f", from sequence {sequence}, token {token} on"
