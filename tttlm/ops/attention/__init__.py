"""Causal attention: softmax over what a query may see.

`attention` is the public function, `reference` the definition that the others are tested against, `blockwise` what
runs on CPU, `cudnn` and `splash` the kernels of NVIDIA GPUs and TPUs, `mask` the rule of who sees whom.
"""

from tttlm.ops.attention.dot_product import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
