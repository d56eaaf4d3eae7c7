"""How convolutions start is a named choice: as PyTorch's, or as those of the official JAX trainer."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

import tttlm
from tttlm.parts.conv import CausalConv


def test_convolutions_start_as_pytorch_or_flax_has_them():
    torch = CausalConv(5000, 4, rngs=nnx.Rngs(0))
    assert float(jnp.abs(torch.kernel[...]).max()) <= 0.5
    assert float(jnp.abs(torch.bias[...]).max()) > 0.49
    flax = CausalConv(5000, 4, init="lecun_normal", rngs=nnx.Rngs(0))
    reference = nnx.Conv(1, 5000, (4,), rngs=nnx.Rngs(1)).kernel[...]  # one channel a group: a fan-in of 4
    for kernel in (flax.kernel[...], reference):
        assert abs(float(jnp.std(kernel)) - 0.5) < 0.01
        assert float(jnp.abs(kernel).max()) > 0.6
    assert not np.any(flax.bias[...])


def test_every_convolution_of_a_ttt_model_follows_the_choice():
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 8}
    biases = {}
    for init in ("pytorch", "lecun_normal"):
        model = tttlm.LanguageModel(tttlm.ModelConfig(**sizes, conv_init=init), rngs=nnx.Rngs(0))
        block = model.stack.blocks[0]
        convs = (block.conv, block.mixer.conv_q, block.mixer.conv_k)
        biases[init] = [bool(np.any(conv.bias[...])) for conv in convs]
    assert biases == {"pytorch": [True] * 3, "lecun_normal": [False] * 3}
