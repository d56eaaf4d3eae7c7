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
    return pattern * config.repeats + 2 * config.width * config.vocab_size


def _block(config: ModelConfig, mixer: str, length: int) -> float:
    conv = 2 * config.conv_width * config.width if config.conv_before(mixer) else 0
    return conv + mixer_flops_per_token(config, mixer, length) + 6 * config.width * config.feed_forward


def mixer_flops_per_token(config: ModelConfig, mixer: str, length: int) -> float:
    """Of one sequence layer alone, mean over the tokens of a sequence of that length."""
    width = config.width
    if mixer in ("ttt_linear", "ttt_mlp"):
        head = width // config.heads
        widths = [head, head] if mixer == "ttt_linear" else [head, 4 * head, head]
        size = min(config.ttt.mini_batch_size, length)
        # Every inner kernel meets keys, queries and the update; all but the first pass a gradient down. The tokens
        # of a mini-batch meet each other twice.
        kernels = [i * o for i, o in pairwise(widths)]
        inner = 6 * sum(kernels) + 2 * sum(kernels[1:]) + 2 * size * (sum(widths[:-1]) + sum(widths[1:]))
        projections = (3 if config.share_qk else 4) + (1 if config.gate else 0)
        convs = 2 * 2 * config.conv_width * width if config.share_qk else 0
        rates = 2 * width * config.heads if config.ttt.learned_rate else 0
        return 2 * projections * width * width + convs + rates + config.heads * inner
    if mixer in ("attention", "sliding_attention"):
        attention = config.attention
        head = attention.head_width or width // config.heads
        kv_heads = attention.kv_heads or config.heads
        window = min(length, attention.window) if mixer == "sliding_attention" else length
        seen = window - window * (window - 1) / (2 * length)  # keys a query sees, on average
        return 2 * width * head * (2 * config.heads + 2 * kv_heads) + 4 * seen * config.heads * head
    if mixer == "mamba":
        inner, state = config.mamba.expand * width, config.mamba.state_width
        rank = config.mamba.dt_rank or math.ceil(width / 16)
        linear = 2 * inner * (3 * width + (rank + 2 * state) + rank + config.conv_width)
        return linear + 6 * inner * state  # decay, input and read-out of every state
    if mixer == "mamba2":
        m = config.mamba2
        inner = m.expand * width
        heads, chunk = inner // m.head_width, min(m.chunk_size or 256, length)
        linear = 2 * width * (2 * inner + 2 * m.groups * m.state_width + heads) + 2 * inner * width
        conv = 2 * config.conv_width * (inner + 2 * m.groups * m.state_width)
        # C B^T once a group, its product with the inputs once a head, and the states in and out
        scan = 2 * chunk * (m.groups * m.state_width + inner) + 4 * inner * m.state_width
        return linear + conv + scan
    raise ValueError(f"unknown mixer {mixer!r}")
