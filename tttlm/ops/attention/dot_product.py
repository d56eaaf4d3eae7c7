"""The public function: checks its arguments and picks an implementation."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tttlm.ops.attention import cudnn, splash
from tttlm.ops.attention.blockwise import blockwise
from tttlm.ops.attention.reference import reference
from tttlm.ops.target import target_platform

IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "reference": reference,
    "blockwise": blockwise,
    "cudnn": cudnn.cudnn,
    "splash": splash.splash,
}
OBSTACLES = {"cudnn": cudnn.obstacle, "splash": splash.obstacle}
KERNELS = {"gpu": "cudnn", "tpu": "splash"}
FEW_SCORES = 2**16  # queries times keys up to which computing all scores at once is fastest


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    *,
    sliding_window: int | None = None,
    query_positions: Int[Array, "#B T"] | None = None,
    key_positions: Int[Array, "#B S"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """`softmax(q kᵀ / √K) v` over the keys that a query attends to (arXiv 1706.03762, eq. 1).

    A query attends to the keys of its own segment whose position is not after its own and, with a window, less than
    `sliding_window` before it. A query without keys gives zeros. Scores and softmax are computed in float32, or in
    float64 if `q` is float64.

    Args:
        q: queries of `H` heads.
        k, v: keys and values of `G` heads; head `h` of `q` reads head `h // (H / G)` (arXiv 2305.13245).
        sliding_window: number of positions that a query attends to, including its own; None for all.
        query_positions, key_positions: positions in the sequence, in any order; None for 0, 1, 2, ...
        query_segments, key_segments: any non-negative ids, or -1 and -2; None for one segment.
        implementation: "reference", "blockwise" (memory grows with T), "cudnn" or "splash". None picks by the device
            it is traced for: a kernel if possible, else blockwise, or the reference if there are few scores.

    Returns:
        The outputs `[B, T, H, K]`, in the dtype of `q`.

    Raises:
        ValueError: shapes do not match, or the named implementation is unknown or cannot be used here.

    Example:
        >>> q = k = v = jnp.ones((1, 8, 2, 16))
        >>> attention(q, k, v, sliding_window=4).shape
        (1, 8, 2, 16)
    """
    (batch, time, num_heads, head_dim), groups = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim or num_heads % groups:
        raise ValueError(
            "keys and values must be [B, S, G, K] for queries [B, T, H, K] with H a multiple of G; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"a window must have at least 1 position; got {sliding_window}")
    if (query_segments is None) != (key_segments is None) or (query_positions is None) != (key_positions is None):
        raise ValueError("give segments, and positions, of queries and keys both or of neither")
    if query_positions is None and time != k.shape[1]:
        raise ValueError(f"give positions when queries and keys differ in number; got {time} and {k.shape[1]}")

    in_order = query_positions is None
    if implementation is None:
        implementation = _pick(q, k, in_order, query_segments is not None)
    elif implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementations are {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
    elif implementation in OBSTACLES:
        reason = OBSTACLES[implementation](q, k, in_order, query_segments is not None)
        if reason:
            raise ValueError(f"attention implementation {implementation!r} cannot be used here: {reason}")
    if in_order and implementation not in OBSTACLES:  # a kernel knows this order
        query_positions = key_positions = jnp.arange(time, dtype=jnp.int32)[None]
    function = IMPLEMENTATIONS[implementation]
    return function(q, k, v, query_positions, key_positions, query_segments, key_segments, sliding_window)


def _pick(q: Array, k: Array, in_order: bool, segmented: bool) -> str:
    if q.shape[1] == 1 or q.shape[1] * k.shape[1] <= FEW_SCORES:
        return "reference"
    kernel = KERNELS.get(target_platform())
    if kernel and OBSTACLES[kernel](q, k, in_order, segmented) is None:
        return kernel
    return "blockwise"
