"""Sharding of activations on a mesh: layers name the dimensions of an array, which map to axes of the mesh.

Layers have no sharding annotations. The mesh is that of JAX's context (`jax.set_mesh`, or
`jax.sharding.use_abstract_mesh` while tracing); if it does not have all of `MESH_AXES`, has one device, or has no
`Auto` axes, every function here changes nothing. Otherwise a word of capitals and underscores names the dimensions of
an array, in order:

    B  sequences of the batch, over the mesh axes `data` and `fsdp`
    T  tokens, over `context`
    F  output features of a projection, or vocabulary, over `tensor`
    H  heads or channels within a mixer, over `tensor` and `context`: a device has all tokens of its heads
    P  a dimension of a parameter, over `fsdp` and `context`
    _  not sharded, and neither are dimensions without a letter

    Between `BTF` and `B_H` there is an all-to-all among the devices of `context`, as in DeepSpeed-Ulysses
    (arXiv 2309.14509). It is exact for every mixer, because heads or channels are computed independently.
"""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from tttlm.ops.conv import causal_conv
from tttlm.ops.documents import Documents
from tttlm.ops.projection import projection

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH, MIXER = ("data", "fsdp"), ("tensor", "context")
STORAGE = ("fsdp", "context")  # over these parameters are sharded in storage and gathered before use
_AXES_OF: dict[str, tuple[str, ...]] = {"B": BATCH, "T": ("context",), "F": ("tensor",), "H": MIXER}
_AXES_OF |= {"P": STORAGE, "_": ()}

# Mesh axes for the dimensions of parameters that many layers have (see `tttlm.mixers.Mixer.parameter_rules`).
TO_FEATURES = ("fsdp context", "tensor")  # a projection from the stream, D F
FROM_FEATURES = ("tensor", "fsdp context")  # a projection back to it, F D
CONV_KERNEL = ("", "tensor context fsdp")  # W F
FEATURES = ("tensor",)  # a vector, F


def _mesh() -> AbstractMesh | None:
    """The mesh of JAX's context if arrays are sharded over it, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh if all(types[axis] == AxisType.Auto for axis in MESH_AXES) else None


def num_shards(dim: str) -> int:
    """The number of devices over which a dimension is sharded."""
    mesh = _mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _AXES_OF[dim])


def mesh_axes(dims: str) -> tuple[str, ...]:
    """The mesh axes over which these dimensions are sharded, for a collective within `each_device`."""
    mesh = _mesh()
    return () if mesh is None else tuple(axis for d in dims for axis in _AXES_OF[d] if mesh.shape[axis] > 1)


def with_sharding(x: Shaped[Array, "*S"], dims: str) -> Shaped[Array, "*S"]:
    """`x`, constrained to be sharded as `dims` say; a dimension that its axes do not divide is not sharded."""
    return x if _mesh() is None else jax.lax.with_sharding_constraint(x, _spec(_dividing(x, dims)))


def to_heads(x: Shaped[Array, "B T E"]) -> Shaped[Array, "B T E"]:
    """Exchanges sharding over tokens, as projections have it, for sharding over a mixer's heads or channels."""
    # The first constraint keeps the projection from being computed on gathered tokens.
    return with_sharding(with_sharding(x, "BTF"), "B_H")


def to_stream(x: Shaped[Array, "B T E"]) -> Shaped[Array, "B T E"]:
    """Exchanges sharding over a mixer's heads or channels for sharding over tokens."""
    return with_sharding(with_sharding(x, "B_H"), "BTF")


def each_device(function: Callable[..., Any], ins: Sequence[Any], outs: Any) -> Callable[..., Any]:
    """`function`, run by every device on its own shards of the arguments, with no other communication than its own.

    Loops over time stay on the device, and so do data-dependent branches. If mesh axes do not divide the sequences or
    tokens, as in a decoding step of one token, every device computes all of them.

    Args:
        function: a function from arrays to arrays; an argument may be a tree of arrays, or None.
        ins, outs: dimensions of every argument and result; one word serves all leaves of a tree.
    """
    if _mesh() is None:
        return function

    def run(*arguments: Any) -> Any:
        pairs = list(zip(arguments, ins, strict=True))
        replicated = set().union(*(_undivided(argument, dims) for argument, dims in pairs if argument is not None))
        specs = tuple(None if argument is None else _specs(dims, replicated) for argument, dims in pairs)
        return jax.shard_map(function, in_specs=specs, out_specs=_specs(outs, replicated), check_vma=False)(*arguments)

    return run


def all_reduce(x: Array, axes: tuple[str, ...], collective: Callable[..., Array] = jax.lax.psum) -> Array:
    """Within `each_device`, the sum (or another `collective`) of `x` over the devices along `axes`."""
    return collective(x, axes) if axes else x


class EmbeddingSharding(NamedTuple):
    """The sharding of a stored embedding `[V, D]`, for functions within `each_device`.

    Attributes:
        dims: The dimensions of the stored embedding.
        vocabulary: Mesh axes over which its rows are sharded.
        features: Mesh axes over which its columns are sharded in storage, and gathered to compute.
        tokens: Mesh axes over which sequences and tokens are sharded.
    """

    dims: str
    vocabulary: tuple[str, ...]
    features: tuple[str, ...]
    tokens: tuple[str, ...]

    def gather(self, embedding: Float[Array, "v d"]) -> Float[Array, "v D"]:
        """All columns of this device's rows."""
        return jax.lax.all_gather(embedding, self.features, axis=1, tiled=True) if self.features else embedding

    def reduce_scatter(self, x: Float[Array, "v D"]) -> Float[Array, "v d"]:
        """The sum over all sequences and tokens, sharded as the argument of `gather`."""
        if not self.features:
            return all_reduce(x, self.tokens)
        return jax.lax.psum(jax.lax.psum_scatter(x, self.features, scatter_dimension=1, tiled=True), "data")

    def first_token(self, embedding: Float[Array, "v D"]) -> Int[Array, ""]:
        """The id of the first token of this device's rows."""
        if not self.vocabulary:
            return jnp.zeros((), jnp.int32)
        return jax.lax.axis_index(self.vocabulary) * embedding.shape[0]


def embedding_sharding(embedding: Float[Array, "V D"]) -> EmbeddingSharding:
    """The sharding of an embedding on the mesh; must be called outside `each_device`."""
    dims = _dividing(embedding, "FP")
    return EmbeddingSharding(dims, mesh_axes(dims[0]), mesh_axes(dims[1]), mesh_axes("BT"))


def lookup(embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Dtype) -> Float[Array, "B T D"]:
    """The rows of `tokens`, in `dtype`; their gradient is summed in the dtype of the embedding."""
    stored = embedding_sharding(embedding)

    def local(embedding: Array, tokens: Array) -> Array:
        embedding = stored.gather(embedding)
        index = tokens - stored.first_token(embedding)
        here = (index >= 0) & (index < embedding.shape[0])
        return all_reduce(jnp.where(here[..., None], embedding[index], 0).astype(dtype), stored.vocabulary)

    return each_device(local, (stored.dims, "BT"), "BT")(embedding, tokens)


def repeat_groups(x: Shaped[Array, "B T G N"], num_heads: int) -> Shaped[Array, "B T R N"]:
    """Groups that several heads read, repeated until every device has those of its heads."""
    devices = num_shards("H")
    groups = x.shape[2]
    repeats = next(r for r in range(1, devices + 1) if groups * r % devices == 0)
    assert num_heads % (groups * repeats) == 0, "the number of devices divides the number of heads"
    return x if repeats == 1 else x.repeat(repeats, axis=2)


def project(linear: nnx.Linear, x: Float[Array, "B T D"], sizes: Sequence[int]) -> list[Float[Array, "B T _"]]:
    """`linear(x)`, split into parts of these sizes.

    If features are sharded over `tensor`, each part is a separate product, so that it is sharded evenly.
    """
    cuts = list(accumulate(sizes))[:-1]
    if num_shards("F") == 1:
        return [with_sharding(part, "BTF") for part in jnp.split(linear(x), cuts, axis=-1)]
    kernels = jnp.split(linear.kernel[...], cuts, axis=-1)
    biases = [None] * len(sizes) if linear.bias is None else jnp.split(linear.bias[...], cuts)
    parts = []
    for kernel, bias in zip(kernels, biases, strict=True):
        a, b, c = linear.promote_dtype((x, kernel, bias), dtype=linear.dtype)
        y = a @ with_sharding(with_sharding(b, "P_"), "PF")  # in two steps that the compiler can implement
        parts.append(with_sharding(y if c is None else y + c, "BTF"))
    return parts


def project_heads(linear: nnx.Linear, x: Float[Array, "B T I"], dims: str) -> Float[Array, "B T O"]:
    """`linear(x)` without bias, from or to the channels of a mixer, with its kernel sharded as `dims`: over channels
    too.

    Without this constraint the compiler may gather the channels of all tokens for the kernel's gradient.
    """
    x, kernel = linear.promote_dtype((x, linear.kernel[...]), dtype=linear.dtype)
    return projection(x, with_sharding(kernel, dims), (((x.ndim - 1,), (0,)), ((), ())))


def conv_along_stream(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "W C"],
    bias: Float[Array, "C"] | None,
    docs: Documents | None,
) -> Float[Array, "B T C"]:
    """`causal_conv` of complete sequences sharded over `context`: every device sends its tail to the next one."""
    devices = num_shards("T")
    if devices == 1:  # taps sharded over `tensor` would reshard the stream
        kernel, bias = with_sharding(kernel, "_"), None if bias is None else with_sharding(bias, "_")
        return causal_conv(x, kernel, bias, docs=docs)[0]

    def local(x: Array, kernel: Array, bias: Array | None, docs: Documents | None) -> Array:
        def from_the_device_before(a: Array) -> Array:  # zeros for the first
            return jax.lax.ppermute(a, "context", [(i, i + 1) for i in range(devices - 1)])

        if docs is not None:
            docs = replace(docs, lengths=None)  # they are of the complete sequence, and only the next state needs them
        tail = from_the_device_before(causal_conv(x, kernel, docs=docs)[1])
        if docs is not None:
            docs = replace(docs, index=docs.index - from_the_device_before(docs.last_index)[:, None])
        return causal_conv(x, kernel, bias, tail=tail, docs=docs)[0]

    of_docs = jax.tree.map(lambda a: "BT"[: a.ndim], docs)
    return each_device(local, ("BT_", "_", "_", of_docs), "BT_")(x, kernel, bias, docs)


def _dividing(x: Array, dims: str) -> str:
    return "".join(d if size % num_shards(d) == 0 else "_" for d, size in zip(dims, x.shape, strict=False))


def _undivided(tree: Any, dims: Any) -> set[str]:
    """Those of `B` and `T` whose mesh axes do not divide the dimension of some array of a tree."""
    found: set[str] = set()

    def note(dims: str, part: Any) -> None:
        for x in jax.tree.leaves(part):
            found.update(d for d, size in zip(dims, x.shape, strict=False) if d in "BT" and size % num_shards(d))

    jax.tree.map(note, dims, tree)
    return found


def _spec(dims: str) -> PartitionSpec:
    return PartitionSpec(*(_AXES_OF[d] or None for d in dims))


def _specs(dims: Any, replicated: Set[str]) -> Any:
    """A spec for every array; the dimensions in `replicated` are not sharded."""
    return jax.tree.map(lambda d: _spec("".join("_" if c in replicated else c for c in d)), dims)
