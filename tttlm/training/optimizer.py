"""AdamW with a clipped gradient, its learning-rate schedule, and the warm-up of the inner learning rate."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tttlm.training.config import OptimizerConfig, TrainConfig
from tttlm.training.sharding import path_name

# Matrices decay. Everything else has a name that says what it is; shapes do not tell, because the parameters of
# stacked blocks carry one more axis.
DECAYED = re.compile(r"(^|/)(kernel|embedding)$")


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: kernels and embeddings."""

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        return bool(DECAYED.search(path_name(path)))

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """From gradients to the direction of the update; the step multiplies it by minus the learning rate.

    The rate stays outside so that it follows the step that the run is at, skipped steps included.
    """
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )


def learning_rate(config: TrainConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The rate of update `step`, counted from 0: it rises to the peak and ends at `schedule.final`."""
    peak, final = config.optimizer.learning_rate, config.schedule.final
    warmup = config.warmup_steps
    rising = (step + 1) / max(warmup, 1)
    done = (step - warmup) / max(config.steps - 1 - warmup, 1)
    falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
    return jnp.where(step < warmup, peak * rising, final + (peak - final) * falling).astype(jnp.float32)


def inner_multiplier(config: TrainConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """What the inner learning rate of every TTT layer is multiplied by at update `step`, counted from 0."""
    start = config.inner_start
    share = jnp.minimum(1.0, step / max(config.inner_warmup_steps, 1))
    return jnp.asarray(start + (1 - start) * share, jnp.float32)
