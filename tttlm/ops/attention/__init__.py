"""Causal attention: softmax over the keys that a query may attend to.

`attention` is the public function, `reference` the definition that the others are tested against, `blockwise` the
implementation for CPU, `cudnn` and `splash` the kernels of NVIDIA GPUs and TPUs, `mask` the attention mask.
"""

from tttlm.ops.attention.dot_product import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
