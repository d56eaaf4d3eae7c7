"""Y-shaped networks for test-time training: shared features, a main branch, a self-supervised branch."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tttlm.errors import InputError

Norm = Literal["group", "batch"]


class YShaped(nnx.Module):
    """A network with two branches on shared features.

    A call returns the output of the main branch, `self_supervised` that of the auxiliary branch.

    Args:
        shared: module from inputs to features; it learns at test time.
        main: module from features to the main output; it is fixed at test time.
        auxiliary: module from features to the self-supervised output.
    """

    def __init__(self, shared: Any, main: Any, auxiliary: Any):
        self.shared, self.main, self.auxiliary = shared, main, auxiliary

    def __call__(self, inputs: Array) -> Array:
        return self.main(self.shared(inputs))

    def self_supervised(self, inputs: Array) -> Array:
        return self.auxiliary(self.shared(inputs))


SHARED = nnx.All(nnx.Param, nnx.PathContains("shared"))
"""The `nnx` filter of the shared features of a `YShaped` model."""

SELF_SUPERVISED_PATH = nnx.All(nnx.Param, nnx.Any(nnx.PathContains("shared"), nnx.PathContains("auxiliary")))
"""The `nnx` filter of the variables that learn in arXiv 1909.13231: the shared features and the auxiliary branch."""


class Residual(nnx.Module):
    """A pre-activation block: norm, ReLU, 3x3 convolution, twice; the shortcut averages pixels and pads channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, *, rngs: nnx.Rngs):
        self.norm_1, self.conv_1 = _norm(norm, inputs, rngs), _conv(inputs, outputs, stride, rngs)
        self.norm_2, self.conv_2 = _norm(norm, outputs, rngs), _conv(outputs, outputs, 1, rngs)
        self.stride, self.widening = stride, outputs - inputs

    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        h = self.conv_1(jax.nn.relu(self.norm_1(x)))
        h = self.conv_2(jax.nn.relu(self.norm_2(h)))
        if self.stride > 1:
            x = nnx.avg_pool(x, (self.stride,) * 2, strides=(self.stride,) * 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.widening))) + h


class Head(nnx.Module):
    """A branch after the shared part: stages, a norm, ReLU, the mean over pixels, a linear layer."""

    def __init__(self, stages: list[Any], features: int, outputs: int, norm: Norm, *, rngs: nnx.Rngs):
        self.stages = nnx.List(stages)
        self.norm = _norm(norm, features, rngs)
        self.linear = nnx.Linear(features, outputs, rngs=rngs)

    def __call__(self, h: Float[Array, "B H W C"]) -> Float[Array, "B V"]:
        return self.linear(self.pooled(h))

    def pooled(self, h: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """The inputs of the linear layer."""
        for stage in self.stages:
            h = stage(h)
        return jnp.mean(jax.nn.relu(self.norm(h)), axis=(1, 2))


def resnet26(
    *, classes: int = 10, channels: int = 3, auxiliary_outputs: int = 4, norm: Norm = "group", rngs: nnx.Rngs
) -> YShaped:
    """The network of arXiv 1909.13231 for CIFAR: a pre-activation ResNet of 26 layers, split after its second stage.

    Stages of 16, 32 and 64 channels, four blocks each; the auxiliary branch has a third stage of its own, of the same
    architecture. GroupNorm has 8 groups, as in the authors' release.

    Args:
        classes: number of outputs of the main branch.
        channels: number of channels of the images `[B, S, S, channels]`.
        auxiliary_outputs: number of outputs of the auxiliary branch, 4 for rotation.
        norm: "group", or "batch" as in section 3's variants with batch statistics.
        rngs: random number generators of the parameters.
    """

    def stage(inputs: int, outputs: int, stride: int) -> list[Residual]:
        first = Residual(inputs, outputs, stride, norm, rngs=rngs)
        return [first, *(Residual(outputs, outputs, 1, norm, rngs=rngs) for _ in range(3))]

    shared = nnx.Sequential(_conv(channels, 16, 1, rngs), *stage(16, 16, 1), *stage(16, 32, 2))
    main, auxiliary = (Head(stage(32, 64, 2), 64, n, norm, rngs=rngs) for n in (classes, auxiliary_outputs))
    return YShaped(shared, main, auxiliary)


def small_conv_net(
    *,
    classes: int = 10,
    channels: int = 1,
    auxiliary_outputs: int = 4,
    features: int = 16,
    norm: Norm = "group",
    rngs: nnx.Rngs,
) -> YShaped:
    """A Y-shaped network for small images: two shared convolutions of stride 2, one more and a linear layer per branch.

    Args:
        classes: number of outputs of the main branch.
        channels: number of channels of the images `[B, S, S, channels]`.
        auxiliary_outputs: number of outputs of the auxiliary branch, 4 for rotation.
        features: number of channels after the first convolution, a multiple of 8; later ones have twice as many.
        norm: "group" or "batch".
        rngs: random number generators of the parameters.
    """
    wide = 2 * features
    shared = nnx.Sequential(
        _conv(channels, features, 2, rngs),
        _norm(norm, features, rngs),
        jax.nn.relu,
        _conv(features, wide, 2, rngs),
        _norm(norm, wide, rngs),
        jax.nn.relu,
    )
    main, auxiliary = (
        Head([_conv(wide, wide, 1, rngs)], wide, n, norm, rngs=rngs) for n in (classes, auxiliary_outputs)
    )
    return YShaped(shared, main, auxiliary)


def _norm(norm: Norm, features: int, rngs: nnx.Rngs) -> nnx.Module:
    if norm == "batch":
        return nnx.BatchNorm(features, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=rngs)
    if features % 8:
        raise InputError(f"GroupNorm has 8 groups, which do not divide {features} channels: use a multiple of 8")
    return nnx.GroupNorm(features, num_groups=8, epsilon=1e-5, rngs=rngs)


def _conv(inputs: int, outputs: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        strides=stride,
        padding=1,
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        conv_general_dilated=_convolve,
        rngs=rngs,
    )


def _convolve(x: Array, kernel: Array, strides: Any, padding: Any, **_: Any) -> Array:
    """A convolution as one matrix product with shifted slices, one for each kernel tap.

    Under `vmap` over kernels, one for each sample, it is a batched matrix product; XLA's own convolution would become a
    grouped convolution, which is thirty times slower on a CPU.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in range(2))
    taps = [
        x[:, i : i + (height - 1) * strides[0] + 1 : strides[0], j : j + (width - 1) * strides[1] + 1 : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
