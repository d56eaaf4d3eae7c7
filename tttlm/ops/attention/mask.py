"""The attention mask that every implementation follows."""

from jaxtyping import Array, Bool, Int


def visible(
    query_positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    query_segments: Int[Array, "#B T"] | None,
    key_segments: Int[Array, "#B S"] | None,
    sliding_window: int | None,
) -> Bool[Array, "#B T S"]:
    """True where a query attends to a key: in its segment, not after it, and within the window if there is one."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = distance >= 0
    if sliding_window is not None:
        seen &= distance < sliding_window
    if query_segments is not None and key_segments is not None:
        seen &= query_segments[:, :, None] == key_segments[:, None, :]
    return seen
