"""Building blocks of layers: convolution, norm, feed-forward, padding, and the sharding of activations on a mesh."""

from tttlm.parts.conv import CausalConv
from tttlm.parts.feed_forward import SwiGLU
from tttlm.parts.norm import RMSNorm

__all__ = ["CausalConv", "RMSNorm", "SwiGLU"]
