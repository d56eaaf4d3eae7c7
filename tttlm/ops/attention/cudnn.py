"""Attention by cuDNN's fused kernels, on NVIDIA GPUs.

The kernel has causality and window built in. Segments, and positions other than 0, 1, 2, ..., as those of a cache, need
a dense mask `[B, 1, T, S]`, so the number of its elements is limited.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.attention.mask import masked_attention, visible
from tttlm.ops.target import target_device

LARGEST_MASK = 2**29  # elements: 1 GB of bfloat16


def obstacle(q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], in_order: bool, segmented: bool) -> str | None:
    """Why the kernel cannot compute this exactly on this device, in one line; None if it can."""
    device = target_device()
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return f"cuDNN runs on NVIDIA GPUs, not on {device.platform}"
    capability = float(getattr(device, "compute_capability", 0))
    if capability < 8:
        return f"cuDNN attention needs compute capability 8.0; this GPU has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"cuDNN attention computes in bfloat16 or float16, not with queries in {q.dtype} and keys in {k.dtype}"
    (batch, time, _, head_dim), keys = q.shape, k.shape[1]
    widest = 256 if capability >= 9 else 128
    if head_dim % 8 or head_dim > widest:
        return f"cuDNN attention needs a head_dim of at most {widest} and a multiple of 8, not {head_dim}"
    masked = segmented or not in_order
    if masked and (time % 2 or keys % 2):
        return f"cuDNN attention with segments or positions needs even numbers of queries and keys, not {time}, {keys}"
    if masked and batch * time * keys > LARGEST_MASK:
        return f"cuDNN attention has masks of at most {LARGEST_MASK:,} elements, not {batch} x {time} x {keys}"
    return None


def cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    query_positions: Int[Array, "#B T"] | None,
    key_positions: Int[Array, "#B S"] | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B S"] | None,
    sliding_window: int | None,
) -> Float[Array, "B T H K"]:
    """See `tttlm.ops.attention.attention`; positions are None where they are 0, 1, 2, ..."""
    if query_positions is None and query_segments is None:
        local = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
    if query_positions is None or key_positions is None:
        query_positions = key_positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    seen = visible(query_positions, key_positions, query_segments, key_segments, sliding_window)
    return masked_attention(q, k, v, seen, implementation="cudnn")
