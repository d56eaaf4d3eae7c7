"""What layers are put together from: convolution, norm, feed-forward, and how activations are sharded on a mesh."""

from tttlm.parts.conv import CausalConv
from tttlm.parts.feed_forward import SwiGLU
from tttlm.parts.norm import RMSNorm

__all__ = ["CausalConv", "RMSNorm", "SwiGLU"]
