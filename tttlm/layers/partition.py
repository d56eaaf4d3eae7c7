"""Where activations lie on a mesh of devices: layers name the dimensions of an array, the mesh says what that means.

Layers carry no shardings. Outside of `on_mesh`, and on a mesh of one device, every function here changes nothing.
Within it a word of capitals and underscores stands for the dimensions of an array, in order:

    B  rows, over the mesh axes `data` and `fsdp`
    T  tokens, over `context`
    F  features that a projection makes, or vocabulary, over `tensor`
    H  heads or channels within a mixer, over `tensor` and `context`: a device sees every token of those it holds
    P  a dimension of a parameter, over `fsdp` and `context`
    _  whole on every device; so are dimensions that are not written down

Between `BTF` and `B_H` lies an all-to-all among the devices of `context`: attention over sequences as DeepSpeed-Ulysses
shares it (arXiv 2309.14509), and exact for every mixer, because each computes its heads or channels apart.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from tttlm.ops.conv import causal_conv
from tttlm.ops.documents import Documents
from tttlm.ops.projection import projection

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH, MIXER = ("data", "fsdp"), ("tensor", "context")
STORAGE = ("fsdp", "context")  # their devices keep a share of a parameter each, and gather it when its turn comes
_AXES_OF: dict[str, tuple[str, ...]] = {"B": BATCH, "T": ("context",), "F": ("tensor",), "H": MIXER}
_AXES_OF |= {"P": STORAGE, "_": ()}
_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """What is traced within lies on `mesh`, which has the axes `MESH_AXES`."""
    token = _MESH.set(mesh if mesh.size > 1 else None)
    try:
        yield
    finally:
        _MESH.reset(token)


def shares(dim: str) -> int:
    """Over how many devices a dimension is shared."""
    mesh = _MESH.get()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _AXES_OF[dim])


def place(x: Shaped[Array, "*S"], dims: str) -> Shaped[Array, "*S"]:
    """`x`, laid out as `dims` say; a dimension that its axes do not divide stays whole."""
    mesh = _MESH.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(_dividing(x, dims))))


def to_heads(x: Shaped[Array, "B T E"]) -> Shaped[Array, "B T E"]:
    """From the tokens of the stream, where projections are made, to the heads or channels of a mixer."""
    return place(place(x, "BTF"), "B_H")  # the first keeps the projection from being computed on gathered tokens


def to_stream(x: Shaped[Array, "B T E"]) -> Shaped[Array, "B T E"]:
    """From the heads or channels of a mixer back to the tokens of the stream."""
    return place(place(x, "B_H"), "BTF")


def each_device(function: Callable[..., Any], ins: Sequence[Any], outs: Any) -> Callable[..., Any]:
    """`function`, run by every device on its own part of the arguments, with no communication but its own.

    Loops over time stay on the device, and so does what a kernel or a branch decides from its rows.

    Args:
        function: from arrays to arrays; an argument may be a tree of them, or None.
        ins, outs: dimensions of every argument and result; one word serves all leaves of a tree.
    """
    mesh = _MESH.get()
    if mesh is None:
        return function

    def run(*arguments: Any) -> Any:
        specs = tuple(None if argument is None else _specs(dims) for argument, dims in zip(arguments, ins, strict=True))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=_specs(outs), check_vma=False)(*arguments)

    return run


def total(x: Array, dims: str, collective: Callable[..., Array] = jax.lax.psum) -> Array:
    """Within `each_device`, the sum (or what `collective` makes) of what the devices that share `dims` hold."""
    axes = _axes(dims)
    return collective(x, axes) if axes and _MESH.get() is not None else x


def table_dims(table: Float[Array, "V D"]) -> str:
    """How a table with a row for every token of the vocabulary is shared at rest."""
    return _dividing(table, "FP")


def gather_columns(table: Float[Array, "v d"], dims: str) -> Float[Array, "v D"]:
    """Within `each_device`, the whole rows of a table that lies as `dims` (`table_dims`) say."""
    if shares(dims[1]) == 1:
        return table
    return jax.lax.all_gather(table, STORAGE, axis=1, tiled=True)


def scatter_total(x: Float[Array, "v D"], dims: str) -> Float[Array, "v d"]:
    """Within `each_device`, the sum over all rows and tokens, back in the layout that `gather_columns` started from."""
    if shares(dims[1]) > 1:
        return jax.lax.psum(jax.lax.psum_scatter(x, STORAGE, scatter_dimension=1, tiled=True), "data")
    return total(x, "BT")


def first_row(table: Float[Array, "v D"], dims: str) -> Int[Array, ""]:
    """Within `each_device`, the token that the first row it holds is of."""
    return jax.lax.axis_index("tensor") * table.shape[0] if shares(dims[0]) > 1 else jnp.zeros((), jnp.int32)


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Dtype) -> Float[Array, "B T D"]:
    """The rows of `tokens`, in `dtype`; their gradient is added up in the dtype of the table."""
    dims = table_dims(table)

    def local(table: Array, tokens: Array) -> Array:
        table = gather_columns(table, dims)
        place = tokens - first_row(table, dims)
        here = (place >= 0) & (place < table.shape[0])
        return total(jnp.where(here[..., None], table[place], 0).astype(dtype), dims[0])

    return each_device(local, (dims, "BT"), "BT")(table, tokens)


def share_groups(x: Shaped[Array, "B T G N"], num_heads: int) -> Shaped[Array, "B T R N"]:
    """Groups that several heads read, repeated as often as it takes for every device to hold those of its heads."""
    devices = shares("H")
    groups = x.shape[2]
    repeats = next(r for r in range(1, devices + 1) if groups * r % devices == 0)
    assert num_heads % (groups * repeats) == 0, "devices that share the heads divide them"
    return x if repeats == 1 else x.repeat(repeats, axis=2)


def project(linear: nnx.Linear, x: Float[Array, "B T D"], widths: Sequence[int]) -> list[Float[Array, "B T _"]]:
    """`linear(x)`, cut into parts of these widths.

    Where `tensor` shares features each part is a product of its own, so that it is shared evenly whatever the cuts.
    """
    cuts = list(accumulate(widths))[:-1]
    if shares("F") == 1:
        return [place(part, "BTF") for part in jnp.split(linear(x), cuts, axis=-1)]
    kernels = jnp.split(linear.kernel[...], cuts, axis=-1)
    biases = [None] * len(widths) if linear.bias is None else jnp.split(linear.bias[...], cuts)
    parts = []
    for kernel, bias in zip(kernels, biases, strict=True):
        a, b, c = linear.promote_dtype((x, kernel, bias), dtype=linear.dtype)
        y = a @ place(place(b, "P_"), "PF")  # in two moves that the compiler knows how to make
        parts.append(place(y if c is None else y + c, "BTF"))
    return parts


def project_heads(linear: nnx.Linear, x: Float[Array, "B T I"], dims: str) -> Float[Array, "B T O"]:
    """`linear(x)` without bias, from or to the channels of a mixer, with its kernel as `dims` say: by channels as well.

    Left to itself the compiler may gather the channels of all tokens for the kernel's gradient.
    """
    x, kernel = linear.promote_dtype((x, linear.kernel[...]), dtype=linear.dtype)
    return projection(x, place(kernel, dims), (((x.ndim - 1,), (0,)), ((), ())))


def conv_along_stream(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, "C"] | None,
    docs: Documents | None,
) -> Float[Array, "B T C"]:
    """`causal_conv` of whole rows whose tokens `context` shares: every device sends the next one its tail."""
    devices = shares("T")
    if devices == 1:  # taps that `tensor` shares would have the stream shared like them, and gathered again
        kernel, bias = place(kernel, "_"), None if bias is None else place(bias, "_")
        return causal_conv(x, kernel, bias, docs=docs)[0]

    def local(x: Array, kernel: Array, bias: Array | None, docs: Documents | None) -> Array:
        def from_the_device_before(a: Array) -> Array:  # zeros for the first
            return jax.lax.ppermute(a, "context", [(i, i + 1) for i in range(devices - 1)])

        tail = from_the_device_before(causal_conv(x, kernel, docs=docs)[1])
        if docs is not None:
            docs = replace(docs, index=docs.index - from_the_device_before(docs.last_index)[:, None])
        return causal_conv(x, kernel, bias, tail=tail, docs=docs)[0]

    of_docs = jax.tree.map(lambda a: "BT"[: a.ndim], docs)
    return each_device(local, ("BT_", "_", "_", of_docs), "BT_")(x, kernel, bias, docs)


def _dividing(x: Array, dims: str) -> str:
    return "".join(d if size % shares(d) == 0 else "_" for d, size in zip(dims, x.shape, strict=False))


def _axes(dims: str) -> tuple[str, ...]:
    return tuple(axis for d in dims for axis in _AXES_OF[d])


def _spec(dims: str) -> PartitionSpec:
    return PartitionSpec(*(_AXES_OF[d] or None for d in dims))


def _specs(dims: Any) -> Any:
    return jax.tree.map(_spec, dims)
