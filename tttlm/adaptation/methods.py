"""Methods that are compared with TTT, each as an `Adapter`: no adaptation, batch statistics, TENT, UDA-SS."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tttlm.adaptation.adapter import Adapter, Objective, split
from tttlm.adaptation.objectives import entropy_objective
from tttlm.errors import InputError

NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.LayerNorm, nnx.InstanceNorm, nnx.RMSNorm)


def no_adaptation(model: nnx.Module, *, batch_size: int = 1) -> Adapter:
    """The model without adaptation, which predicts `batch_size` samples at a time."""
    return Adapter(model, None, batch_size=batch_size)


def batch_statistics(model: nnx.Module, *, batch_size: int) -> Adapter:
    """Every batch normalised by its own statistics instead of those of training (arXiv 2006.10963).

    Raises:
        InputError: the model has no BatchNorm.
    """
    return Adapter(_with_batch_statistics(model), None, batch_size=batch_size)


def tent(model: nnx.Module, *, optimizer: optax.GradientTransformation, batch_size: int, steps: int = 1) -> Adapter:
    """TENT (arXiv 2006.10726): scales and biases of norms minimise the entropy of each batch, after it was predicted.

    BatchNorms use the statistics of the batch. Other norms are unchanged, because they use the statistics of each
    sample anyway.

    Args:
        model: the model to start from; it is not changed.
        optimizer: an optax optimiser.
        batch_size: number of samples that are predicted and learned from together.
        steps: number of gradient steps on each batch.

    Raises:
        InputError: the model has no norm with parameters.
    """
    if any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model)):
        model = _with_batch_statistics(model)
    return Adapter(
        model,
        entropy_objective,
        learns=parameters_of(model, *NORMS),
        optimizer=optimizer,
        steps=steps,
        reset="never",
        batch_size=batch_size,
        order="predict_first",
    )


def uda_ss(
    model: nnx.Module,
    loss: Callable[[Any, Any, Any], Array],
    objective: Objective,
    source: tuple[np.ndarray, Int[np.ndarray, "N"]],
    target: np.ndarray,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    seed: int = 0,
    on_step: Callable[[int], Any] = lambda steps: None,
) -> Adapter:
    """Unsupervised domain adaptation by self-supervision (arXiv 1909.11825), with the complete unlabelled test set.

    Each step adds the main loss on labelled source samples to the self-supervised loss on source and on target samples.
    Unlike all other methods here, it uses the test set before the first prediction; section 3 of arXiv 1909.13231
    compares TTT-Online, which gets one sample at a time, with it.

    Args:
        model: the model to start from; it is not changed.
        loss: `loss(model, inputs, labels)`.
        objective: the self-supervised loss.
        source: inputs `[N, ...]` and labels `[N]` of training.
        target: inputs `[M, ...]` of the test set, without labels.
        optimizer: an optax optimiser of all parameters.
        steps: number of training steps.
        batch_size: number of source samples, and of target samples, in a step; of samples that are predicted together.
        seed: seed of the batches and of the random numbers of the objective.
        on_step: called with 1 after every step.

    Returns:
        The trained model as an adapter that does not adapt further.
    """
    graph, params, rest = split(model, nnx.Param)
    draw, key = np.random.default_rng(seed), jax.random.key(seed)
    opt_state = optimizer.init(params)
    for step in range(steps):
        some = draw.integers(len(source[0]), size=batch_size)
        others = draw.integers(len(target), size=batch_size)
        batch = source[0][some], source[1][some], target[others], jax.random.fold_in(key, step)
        params, opt_state = _uda_step(graph, loss, objective, optimizer, params, opt_state, rest, *batch)
        on_step(1)
    return Adapter(nnx.merge(graph, params, rest, copy=True), None, batch_size=batch_size)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _uda_step(
    graph: Any,
    loss: Any,
    objective: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    rest: Any,
    inputs: Array,
    labels: Array,
    unlabelled: Array,
    key: Array,
) -> Any:
    """One step on the sum of both losses; compiled once for all test sets of equal size."""

    def total(params: Any) -> Array:
        model = nnx.merge(graph, params, rest, copy=True)
        return loss(model, inputs, labels) + objective(model, jnp.concatenate([inputs, unlabelled]), key)

    updates, opt_state = optimizer.update(jax.grad(total)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def parameters_of(model: nnx.Module, *kinds: type) -> Callable[[tuple[Any, ...], Any], bool]:
    """An `nnx` filter of the parameters of modules of these kinds, e.g. scales and biases of norms.

    Raises:
        InputError: the model has no such module with parameters.
    """
    homes = {path for path, module in nnx.iter_modules(model) if isinstance(module, kinds)}
    paths = {path for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)) if path[:-1] in homes}
    if not paths:
        raise InputError(
            f"the model has no parameters of {', '.join(kind.__name__ for kind in kinds)}: name kinds it has"
        )
    return lambda path, value: tuple(path) in paths


def cross_entropy(model: Any, inputs: Array, labels: Int[Array, "B"]) -> Float[Array, ""]:
    """The main loss of a classifier: mean cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()


def _with_batch_statistics(model: nnx.Module) -> nnx.Module:
    if not any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model)):
        raise InputError("the model has no BatchNorm, so it has no batch statistics to use at test time")
    copy = nnx.clone(model)
    copy.set_attributes(nnx.BatchNorm, use_running_average=False)
    return copy
