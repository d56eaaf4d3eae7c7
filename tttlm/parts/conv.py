"""A causal depthwise convolution as a module."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from tttlm.ops.conv import causal_conv
from tttlm.ops.documents import Documents
from tttlm.parts.partition import conv_along_stream, with_sharding

ConvInit = Literal["pytorch", "lecun_normal"]


class CausalConv(nnx.Module):
    """`tttlm.ops.conv.causal_conv` as a module.

    Args:
        channels: number of channels `C`.
        kernel_size: number of taps `W`.
        use_bias: whether a bias is added.
        init: initialisation. "pytorch": kernel and bias uniform in `+-1/sqrt(W)`, as in PyTorch's depthwise `Conv1d`;
            "lecun_normal": the kernel with variance `1/W`, the bias zero, as in Flax's `Conv`.
        dtype: dtype of the computation; None promotes input and kernel.
        param_dtype: dtype of kernel `[W, C]` and bias `[C]`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        use_bias: bool = True,
        init: ConvInit = "pytorch",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(kernel_size)
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        lecun = init == "lecun_normal"
        kernel_init = nnx.initializers.lecun_normal() if lecun else uniform
        bias_init = nnx.initializers.zeros if lecun else uniform
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, channels), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (channels,), param_dtype)) if use_bias else None
        self.dtype = dtype

    def __call__(
        self,
        x: Float[Array, "B T C"],
        tail: Float[Array, "B P C"] | None = None,
        *,
        docs: Documents | None = None,
        channels: slice = slice(None),
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
        """The outputs and the next tail, for `channels` of the weights; see `tttlm.ops.conv.causal_conv`."""
        x, kernel, bias = self._promote(x)
        return causal_conv(x, kernel[:, channels], None if bias is None else bias[channels], tail=tail, docs=docs)

    def along_stream(self, x: Float[Array, "B T C"], *, docs: Documents | None = None) -> Float[Array, "B T C"]:
        """The outputs for complete sequences of the stream; see `tttlm.parts.partition.conv_along_stream`."""
        return conv_along_stream(*self._promote(x), docs)

    def _promote(self, x: Float[Array, "B T C"]) -> tuple[Array, Array, Array | None]:
        dtype = self.dtype or jnp.promote_types(x.dtype, self.kernel.dtype)
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        return x.astype(dtype), with_sharding(self.kernel[...].astype(dtype), ""), bias

    def init_tail(self, batch: int, dtype: Dtype) -> Float[Array, "B P C"]:
        """The tail before the first token."""
        size, channels = self.kernel.shape
        return jnp.zeros((batch, size - 1, channels), dtype)
