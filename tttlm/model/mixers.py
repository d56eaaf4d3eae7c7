"""From the name of a mixer in a configuration to the layer itself."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from tttlm.layers import TTTMLP, TTTLinear
from tttlm.model.config import ModelConfig


def build_mixer(config: ModelConfig, name: str, *, rngs: nnx.Rngs) -> nnx.Module:
    """The sequence layer of that name."""
    common: dict[str, Any] = {
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype(config.param_dtype),
        "kernel_init": nnx.initializers.normal(config.init_std),
        "rngs": rngs,
    }
    if name in ("ttt_linear", "ttt_mlp"):
        layer = TTTLinear if name == "ttt_linear" else TTTMLP
        return layer(
            config.width,
            config.heads,
            mini_batch_size=config.ttt.mini_batch_size,
            inner_learning_rate=config.inner_learning_rate(name),
            share_qk=config.share_qk,
            gate=config.gate,
            conv_width=config.conv_width,
            rope_base=config.rope_base,
            **common,
        )
    raise ValueError(f"unknown mixer {name!r}")
