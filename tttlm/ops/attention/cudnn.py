"""Attention by cuDNN's fused kernels, on NVIDIA GPUs.

The kernel has causality and window built in. Segments need a dense mask `[B, 1, T, T]`, so they are limited to
sequences of moderate length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.attention.mask import visible
from tttlm.ops.target import target_device

LONGEST_MASK = 8192  # 128 MB of bfloat16 per sequence


def obstacle(q: Float[Array, "B T H K"], in_order: bool, segmented: bool) -> str | None:
    """Why the kernel cannot compute this exactly on this device, in one line; None if it can."""
    device = target_device()
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return f"cuDNN runs on NVIDIA GPUs, not on {device.platform}"
    capability = float(getattr(device, "compute_capability", 0))
    if capability < 8:
        return f"cuDNN attention needs compute capability 8.0; this GPU has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention computes in bfloat16 or float16, not in {q.dtype}"
    time, head_dim = q.shape[1], q.shape[3]
    widest = 256 if capability >= 9 else 128
    if head_dim % 8 or head_dim > widest:
        return f"cuDNN attention needs a head_dim of at most {widest} and a multiple of 8, not {head_dim}"
    if not in_order:
        return "cuDNN attention supports only positions 0, 1, 2, ..."
    if segmented and (time % 2 or time > LONGEST_MASK):
        return f"cuDNN attention with segments needs an even number of at most {LONGEST_MASK} tokens, not {time}"
    return None


def cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    query_positions: Int[Array, "1 T"],
    key_positions: Int[Array, "1 T"],
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B T"] | None,
    sliding_window: int | None,
) -> Float[Array, "B T H K"]:
    """See `tttlm.ops.attention.attention`."""
    if query_segments is None:
        local = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
    seen = visible(query_positions, key_positions, query_segments, key_segments, sliding_window)
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], implementation="cudnn")
