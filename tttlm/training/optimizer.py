"""The optimiser of a configuration as one optax transformation, and the warm-up of the inner learning rate."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tttlm.training.config import OptimizerConfig, TrainConfig
from tttlm.training.sharding import STACKED, path_name

# Parameters are classified by name, not by shape, because the parameters of stacked blocks have one more axis.
MATRICES = re.compile(r"(^|/)(kernel|embedding)$")
KERNELS = re.compile(r"(^|/)(?!conv\w*/)[^/]+/kernel$")


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The transformation of gradients to parameter updates.

    The gradient is clipped by its global norm, the method gives a direction, weight decay is added to it, and the
    schedule scales it.
    """
    o = config.optimizer
    return optax.chain(
        *([optax.clip_by_global_norm(o.clip)] if o.clip else []),
        direction(o),
        *([optax.add_decayed_weights(o.weight_decay, mask=decay_mask(o))] if o.weight_decay else []),
        # The learning rate is not rounded to the dtype of the parameters.
        optax.stateless(lambda updates, _: jax.tree.map(_at_least_float32, updates)),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """The method alone: the direction that the learning rate scales, of about unit size for every method.

    Sources: AdamW arXiv 1711.05101, Lion arXiv 2302.06675, Muon with the scale of its updates as in arXiv 2502.16982,
    Adafactor arXiv 1804.04235.
    """
    b1, b2, eps = config.b1, config.b2, config.eps
    if config.name == "lion":
        return optax.scale_by_lion(b1=b1, b2=b2)
    if config.name == "muon":
        return optax.contrib.muon(
            -1.0,  # optax negates the update; here the schedule does
            beta=b1,
            eps=eps,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    if config.name == "adafactor":
        momentum = [optax.ema(b1, debias=False)] if b1 else []
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *momentum)
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def decay_mask(config: OptimizerConfig) -> Any:
    """A function from parameters to a mask, True where weight decay applies."""

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        return config.decay == "all" or bool(MATRICES.search(path_name(path)))

    return lambda params: jax.tree_util.tree_map_with_path(decayed, params)


def muon_dimensions(params: Any) -> Any:
    """The axes of a parameter that Muon treats as a matrix; None for parameters that Adam updates.

    Kernels of projections are matrices, separately for each block and head. Embeddings, vectors and the kernels of
    depthwise convolutions are not.
    """

    def of(path: tuple[Any, ...], x: Any) -> Any:
        name = path_name(path)
        if not KERNELS.search(name) or x.ndim - bool(STACKED.search(name)) < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

    return jax.tree_util.tree_map_with_path(of, params)


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """The learning rate of an update, counted from 0: a linear warm-up to the peak, then a cosine to `schedule.final`.

    With `schedule.warmup_start` "one_step" the first update has the rate peak / warm-up steps and the last one the
    final rate; with "zero" it is `optax.warmup_cosine_decay_schedule`, whose first rate is 0 and whose final rate is
    reached one update after the last.
    """
    peak, final = config.optimizer.learning_rate, config.schedule.final
    warmup, steps = config.warmup_steps, config.steps
    if config.schedule.warmup_start == "zero":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final)
    cosine = optax.cosine_decay_schedule(peak, max(steps - 1 - warmup, 1), final / peak)
    if not warmup:
        return cosine
    rising = optax.linear_schedule(peak / warmup, peak, warmup - 1) if warmup > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rising, cosine], [warmup])


def at_step(opt_state: Any, step: Int[Array, ""]) -> Any:
    """The optimiser's state with its schedule set to the step of the run, which also counts skipped updates."""
    in_schedule = lambda path, _: any(getattr(key, "tuple_name", "") == "ScaleByScheduleState" for key in path)
    return optax.tree.set(opt_state, in_schedule, count=step)


def inner_multiplier(config: TrainConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The multiplier of the inner learning rate of every TTT layer at update `step`, counted from 0."""
    start = config.inner_start
    part = jnp.minimum(1.0, step / max(config.inner_warmup_steps, 1))
    return jnp.asarray(start + (1 - start) * part, jnp.float32)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
