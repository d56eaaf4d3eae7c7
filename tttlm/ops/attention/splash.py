"""Attention by JAX's splash kernel, on TPUs: blocks outside the causal window are skipped."""

import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tttlm.ops.target import target_platform

LANES = 128  # the kernel's smallest block


def obstacle(q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], in_order: bool, segmented: bool) -> str | None:
    """Why the kernel cannot compute this exactly on this device, in one line; None if it can."""
    del k, segmented  # segments are supported
    if target_platform() != "tpu":
        return f"splash attention runs on TPUs, not on {target_platform()}"
    if q.shape[1] % LANES:
        return f"splash attention needs a multiple of {LANES} tokens, not {q.shape[1]}"
    if not in_order:
        return "splash attention supports only positions 0, 1, 2, ..."
    return None


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    query_positions: Int[Array, "1 T"] | None,
    key_positions: Int[Array, "1 T"] | None,
    query_segments: Int[Array, "B T"] | None,
    key_segments: Int[Array, "B T"] | None,
    sliding_window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """See `tttlm.ops.attention.attention`; `interpret` runs the kernel's program on any device, slowly."""
    del query_positions, key_positions  # in order, or the kernel is not used
    time, num_heads, head_dim = q.shape[1:]
    mask = kernels.LocalMask((time, time), (None if sliding_window is None else sliding_window - 1, 0), 0)
    block = max(size for size in (128, 256, 512) if time % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * num_heads), block_sizes=sizes, interpret=interpret
    )

    def rows(q: Array, k: Array, v: Array, query_segments: Array | None, key_segments: Array | None) -> Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(head_dim), k, v))
        segments = None
        if query_segments is not None and key_segments is not None:
            segments = kernels.SegmentIds(query_segments, key_segments)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    # The compiler cannot shard a kernel by itself; sequences are independent, so they are sharded.
    mesh = jax.sharding.get_abstract_mesh()
    axes: list[str] = []
    for name in mesh.axis_names:
        if name not in mesh.manual_axes and q.shape[0] % math.prod(mesh.shape[axis] for axis in [*axes, name]) == 0:
            axes.append(name)
    if axes:
        spec = PartitionSpec(tuple(axes))
        rows = jax.shard_map(rows, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return rows(q, k, v, query_segments, key_segments)
