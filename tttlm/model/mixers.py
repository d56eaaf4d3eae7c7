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
        "kernel_init": nnx.initializers.normal(config.init_std),
        "rngs": rngs,
    }
    if name in ("ttt_linear", "ttt_mlp"):
        layer = TTTLinear if name == "ttt_linear" else TTTMLP
        return layer(
            config.width,
            config.heads,
            mini_batch_size=config.ttt.mini_batch_size,
            remat_mini_batches=config.ttt.remat_mini_batches,
            inner_learning_rate=config.inner_learning_rate(name),
            inner_norm=config.ttt.inner_norm,
            inner_bias=config.ttt.inner_bias,
            learned_start=config.ttt.learned_start,
            learned_rate=config.ttt.learned_rate,
            share_qk=config.share_qk,
            gate=config.gate,
            conv_width=config.conv_width,
            rope_base=config.rope_base,
            **common,
        )
    if name in ("attention", "sliding_attention"):
        attention = config.attention
        sliding = name == "sliding_attention"
        return Attention(
            config.width,
            config.heads,
            kv_heads=attention.kv_heads,
            head_width=attention.head_width,
            window=attention.window if sliding else None,
            max_length=None if sliding else attention.max_length,
            qk_norm=attention.qk_norm,
            use_bias=attention.use_bias,
            rope_base=config.rope_base,
            implementation=attention.implementation,
            **common,
        )
    # As the authors' code starts: PyTorch's default, and the projection out smaller the more blocks add to it.
    del common["kernel_init"]
    common["out_kernel_init"] = nnx.initializers.variance_scaling(1 / (3 * config.layers), "fan_in", "uniform")
    if name == "mamba":
        mamba = config.mamba
        return Mamba(
            config.width,
            state_width=mamba.state_width,
            expand=mamba.expand,
            dt_rank=mamba.dt_rank,
            conv_width=config.conv_width,
            use_bias=mamba.use_bias,
            conv_bias=mamba.conv_bias,
            **common,
        )
    if name == "mamba2":
        mamba2 = config.mamba2
        return Mamba2(
            config.width,
            state_width=mamba2.state_width,
            head_width=mamba2.head_width,
            expand=mamba2.expand,
            groups=mamba2.groups,
            norm_groups=mamba2.norm_groups,
            dt_limit=mamba2.dt_limit,
            conv_width=config.conv_width,
            use_bias=mamba2.use_bias,
            conv_bias=mamba2.conv_bias,
            norm_eps=config.norm_eps,
            chunk_size=mamba2.chunk_size,
            **common,
        )
    raise ValueError(f"unknown mixer {name!r}")
