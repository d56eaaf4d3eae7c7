"""From the name of a mixer in a configuration to the layer itself."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from tttlm.layers import TTTMLP, Attention, Mamba, Mamba2, TTTLinear
from tttlm.model.config import ModelConfig


def build_mixer(config: ModelConfig, name: str, *, rngs: nnx.Rngs) -> nnx.Module:
    """The sequence layer of that name."""
    common: dict[str, Any] = {
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype(config.param_dtype),
        "kernel_init": nnx.initializers.normal(config.initializer_range),
        "rngs": rngs,
    }
    if name in ("ttt_linear", "ttt_mlp"):
        layer = TTTLinear if name == "ttt_linear" else TTTMLP
        return layer(
            config.hidden_size,
            config.num_heads,
            mini_batch_size=config.ttt.mini_batch_size,
            remat_mini_batches=config.ttt.remat_mini_batches,
            inner_learning_rate=config.inner_learning_rate(name),
            inner_norm=config.ttt.inner_norm,
            inner_bias=config.ttt.inner_bias,
            learned_start=config.ttt.learned_start,
            learned_rate=config.ttt.learned_rate,
            share_qk=config.share_qk,
            gate=config.gate,
            conv_kernel=config.conv_kernel,
            rope_theta=config.rope_theta,
            **common,
        )
    if name in ("attention", "sliding_attention"):
        attention = config.attention
        sliding = name == "sliding_attention"
        return Attention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            sliding_window=attention.sliding_window if sliding else None,
            max_length=None if sliding else attention.max_length,
            qk_norm=attention.qk_norm,
            use_bias=attention.use_bias,
            rope_theta=config.rope_theta,
            implementation=attention.implementation,
            **common,
        )
    # As the authors' code starts: PyTorch's default, and the projection out smaller the more blocks add to it.
    del common["kernel_init"]
    common["out_kernel_init"] = nnx.initializers.variance_scaling(1 / (3 * config.num_layers), "fan_in", "uniform")
    if name == "mamba":
        mamba = config.mamba
        return Mamba(
            config.hidden_size,
            state_size=mamba.state_size,
            expand=mamba.expand,
            dt_rank=mamba.dt_rank,
            conv_kernel=config.conv_kernel,
            use_bias=mamba.use_bias,
            conv_bias=mamba.conv_bias,
            **common,
        )
    if name == "mamba2":
        mamba2 = config.mamba2
        return Mamba2(
            config.hidden_size,
            state_size=mamba2.state_size,
            head_dim=mamba2.head_dim,
            expand=mamba2.expand,
            num_groups=mamba2.num_groups,
            norm_groups=mamba2.norm_groups,
            dt_limit=mamba2.dt_limit,
            conv_kernel=config.conv_kernel,
            use_bias=mamba2.use_bias,
            conv_bias=mamba2.conv_bias,
            norm_eps=config.norm_eps,
            chunk_size=mamba2.chunk_size,
            **common,
        )
    raise ValueError(f"unknown mixer {name!r}")
