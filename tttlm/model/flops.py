"""Floating-point operations of a forward pass, counted by formula: two for every multiply-add of a matrix product.

XLA's own count is no use here: it counts the body of a loop once. Element-wise work is left out, causal attention
counts the keys that a query sees, and a training step is three times the forward pass (what rematerialisation
computes again is not counted).
"""

import math
from itertools import pairwise

from tttlm.model.config import ModelConfig


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Mean over the tokens of a sequence of that length."""
    pattern = sum(_block(config, mixer, sequence_length) for mixer in config.mixers)
    return pattern * config.repeats + 2 * config.hidden_size * config.vocab_size


def _block(config: ModelConfig, mixer: str, length: int) -> float:
    conv = 2 * config.conv_kernel * config.hidden_size if config.conv_before(mixer) else 0
    return conv + mixer_flops_per_token(config, mixer, length) + 6 * config.hidden_size * config.intermediate_size


def mixer_flops_per_token(config: ModelConfig, mixer: str, length: int) -> float:
    """Of one sequence layer alone, mean over the tokens of a sequence of that length."""
    hidden_size = config.hidden_size
    if mixer in ("ttt_linear", "ttt_mlp"):
        head = hidden_size // config.num_heads
        widths = [head, head] if mixer == "ttt_linear" else [head, 4 * head, head]
        size = min(config.ttt.mini_batch_size, length)
        # Every inner kernel meets keys, queries and the update; all but the first pass a gradient down. The tokens
        # of a mini-batch meet each other twice.
        kernels = [i * o for i, o in pairwise(widths)]
        inner = 6 * sum(kernels) + 2 * sum(kernels[1:]) + 2 * size * (sum(widths[:-1]) + sum(widths[1:]))
        projections = (3 if config.share_qk else 4) + (1 if config.gate else 0)
        convs = 2 * 2 * config.conv_kernel * hidden_size if config.share_qk else 0
        rates = 2 * hidden_size * config.num_heads if config.ttt.learned_rate else 0
        return 2 * projections * hidden_size * hidden_size + convs + rates + config.num_heads * inner
    if mixer in ("attention", "sliding_attention"):
        attention = config.attention
        head = attention.head_dim or hidden_size // config.num_heads
        num_kv_heads = attention.num_kv_heads or config.num_heads
        sliding_window = min(length, attention.sliding_window) if mixer == "sliding_attention" else length
        seen = sliding_window - sliding_window * (sliding_window - 1) / (2 * length)  # keys a query sees, on average
        return 2 * hidden_size * head * (2 * config.num_heads + 2 * num_kv_heads) + 4 * seen * config.num_heads * head
    if mixer == "mamba":
        inner, state = config.mamba.expand * hidden_size, config.mamba.state_size
        rank = config.mamba.dt_rank or math.ceil(hidden_size / 16)
        linear = 2 * inner * (3 * hidden_size + (rank + 2 * state) + rank + config.conv_kernel)
        return linear + 6 * inner * state  # decay, input and read-out of every state
    if mixer == "mamba2":
        m = config.mamba2
        inner = m.expand * hidden_size
        num_heads, chunk = inner // m.head_dim, min(m.chunk_size or 256, length)
        linear = 2 * hidden_size * (2 * inner + 2 * m.num_groups * m.state_size + num_heads) + 2 * inner * hidden_size
        conv = 2 * config.conv_kernel * (inner + 2 * m.num_groups * m.state_size)
        # C B^T once a group, its product with the inputs once a head, and the states in and out
        scan = 2 * chunk * (m.num_groups * m.state_size + inner) + 4 * inner * m.state_size
        return linear + conv + scan
    raise ValueError(f"unknown mixer {mixer!r}")
