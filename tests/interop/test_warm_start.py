"""A pretrained Transformer gives its weights to TTT and hybrid models, and says which."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tttlm
from tttlm.errors import InputError
from tttlm.interop.warm_start import WarmParameters, pretrained_config, warm_start
from tttlm.model import AttentionConfig, ModelConfig, TTTConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "reference"
PARTS = (("v_proj", "kernel"), ("inner", 0, "kernel"), ("learning_rate", "bias"), ("token_scale",))
SMOLLM, QWEN2 = FIXTURES / "smollm", FIXTURES / "qwen2"


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("folder", "mixers", "num_layers", "backbone"),
    [
        (SMOLLM, ("attention", "ttt_linear"), 4, "mamba"),  # with convolutions before blocks of TTT
        pytest.param(QWEN2, ("ttt_mlp", "attention", "mamba"), 6, "transformer", marks=pytest.mark.slow),
    ],
)
def test_with_a_zero_readout_the_first_logits_are_those_of_the_base(folder, mixers, num_layers, backbone):
    config = pretrained_config(
        folder,
        mixers=mixers,
        num_layers=num_layers,
        backbone=backbone,
        ttt=TTTConfig(mini_batch_size=8),
        dtype="float64",
        param_dtype="float64",
        remat="none",
    )
    start = warm_start(folder, config, zero_readout=True)
    tokens = jnp.arange(20)[None] % 60
    base = tttlm.from_pretrained(folder, param_dtype="float64")(tokens)
    np.testing.assert_allclose(start.model(tokens), base, atol=1e-12)
    # Nothing but what comes last is zero: two zeros one after another would never learn.
    wanted = {"ttt_linear": {"o_proj"}, "ttt_mlp": {"o_proj"}, "mamba": {"out_proj"}, "attention": set()}
    for block in range(num_layers):
        mixer = mixers[block % len(mixers)]
        zero = {name.split(": ")[1] for name in start.zeroed if name.startswith(f"block {block}:")}
        conv = {"conv/kernel", "conv/bias"} if backbone == "mamba" and "ttt" in mixer else set()
        down = {"feed_forward/down_proj/kernel"} if mixer != "attention" else set()
        assert zero == conv | down | {f"mixer/{name}/kernel" for name in wanted[mixer]}
    assert not start.unused
    if folder == QWEN2:
        return
    random = warm_start(folder, config)
    assert not random.zeroed
    assert not np.allclose(random.model(tokens), base, atol=1e-3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Transformer all of whose heads have keys and values of their own, and one head of its own."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    config = ModelConfig(
        vocab_size=29,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        intermediate_size=24,
        mixers=("attention",),
        tie_embeddings=False,
        attention=AttentionConfig(num_kv_heads=2, head_dim=4),
    )
    tttlm.save_pretrained(tttlm.LanguageModel(config, rngs=nnx.Rngs(3)), folder)
    return folder


def test_blocks_in_place_of_attention_take_what_has_their_shape(llama):
    config = pretrained_config(llama, mixers=("ttt_linear",), backbone="mamba")
    start = warm_start(llama, config, rngs=nnx.Rngs(5))
    base = tttlm.from_pretrained(llama)
    ours, theirs = start.model.stack.blocks[0], base.stack.blocks[0]
    fresh = tttlm.LanguageModel(config, rngs=nnx.Rngs(5)).stack.blocks[0]
    np.testing.assert_array_equal(start.model.lm_head.embedding[...], base.lm_head.embedding[...])
    for part in ("mixer_norm.scale", "feed_forward_norm.scale", "feed_forward.up_proj.kernel", "mixer.o_proj.kernel"):
        a, b = ours, theirs
        for name in part.split("."):
            a, b = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(a[...], b[...], err_msg=part)
    # Values of two heads are those of one group.
    v = np.asarray(theirs.mixer.v_proj.kernel[...]).reshape(3, 16, 2, 1, 4)
    np.testing.assert_array_equal(ours.mixer.v_proj.kernel[...], np.tile(v, (1, 1, 1, 2, 1)).reshape(3, 16, 16))
    for part in ("inner", "inner_norm", "learning_rate", "conv_q"):
        for a, b in zip(
            *(nnx.to_flat_state(nnx.state(getattr(block.mixer, part))) for block in (ours, fresh)), strict=True
        ):
            np.testing.assert_array_equal(a[1][...], b[1][...])
    assert start.pretrained["block 2: mixer/v_proj/kernel"] == "model.layers.2.self_attn.v_proj.weight"
    assert start.pretrained["embed/embedding"] == "model.embed_tokens.weight"
    assert start.unused == tuple(f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3))  # shared with queries
    assert "block 0: mixer/conv_q/kernel" in start.new
    names = {*start.pretrained, *start.new}
    assert len(names) == len(start.pretrained) + len(start.new)
    lines = start.report().splitlines()
    assert "block 0: mixer/g_proj/kernel  new" in lines
    assert len(lines) == len(names) + len(start.unused)


@pytest.mark.long
def test_parameters_that_are_read_one_by_one_are_those_of_the_whole_model(llama, monkeypatch):
    """Fresh ones too, which programs of their own initialise."""
    monkeypatch.setattr(import_module("tttlm.interop.warm_start"), "_SMALL", 100)  # W_0 is larger, rates are not
    config = pretrained_config(llama, mixers=("ttt_linear",), backbone="mamba")
    start, parameters = warm_start(llama, config), WarmParameters(llama, config)
    for path in (("norm", "scale"), ("lm_head", "embedding"), *(("stack", "blocks", 0, "mixer", *p) for p in PARTS)):
        values = dict(nnx.to_flat_state(nnx.state(start.model, nnx.Param)))[path][...]
        repeats = [None] if path[0] != "stack" else range(config.repeats)
        for repeat in repeats:
            found = parameters.read(path, repeat)
            np.testing.assert_allclose(found, values if repeat is None else values[repeat], rtol=1e-6, atol=1e-7)
            assert np.any(found) or path[-1] in ("bias", "token_scale")
    sources = parameters.sources()
    compared = {*sources.pretrained, *sources.new}
    assert len(compared) == 2 + 3 * len(PARTS)
    assert set(sources.new) == {name for name in start.new if name in compared}


def test_queries_and_keys_of_ttt_meet_as_those_of_attention_do(llama):
    """The permutation for the other rotary embedding changes no product of a query with a key at the same position."""
    start = warm_start(llama, pretrained_config(llama, mixers=("ttt_mlp",), backbone="transformer"))
    x = np.random.default_rng(0).normal(size=(6, 16)).astype("f")
    ours, theirs = (model.stack.blocks[0].mixer for model in (start.model, tttlm.from_pretrained(llama)))
    project = lambda layer, name, heads: (x @ np.asarray(getattr(layer, name).kernel[...])[1]).reshape(6, heads, 4)
    wanted = np.einsum("qhd,khd->hqk", project(theirs, "q_proj", 4), np.repeat(project(theirs, "k_proj", 2), 2, axis=1))
    found = np.einsum("qhd,khd->hqk", project(ours, "q_proj", 4), project(ours, "k_proj", 4))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    pairs = project(ours, "q_proj", 4)
    np.testing.assert_array_equal(pairs[..., 0::2], project(theirs, "q_proj", 4)[..., :2])


def test_a_warm_started_model_keeps_tokens_and_tokenizer_of_its_base(tmp_path):
    start = warm_start(QWEN2, pretrained_config(QWEN2, mixers=("ttt_linear",), backbone="transformer"))
    assert start.unused == tuple(
        f"model.layers.{i}.self_attn.{name}.bias" for i in range(2) for name in ("k_proj", "q_proj", "v_proj")
    )
    tttlm.save_pretrained(start.model, tmp_path / "ttt")
    again = tttlm.from_pretrained(tmp_path / "ttt")
    assert again.origin.values["eos_token_id"] == [2, 3]
    assert again.config.mixers == ("ttt_linear",)


@pytest.mark.parametrize(
    ("changes", "zero", "message"),
    [
        ({"hidden_size": 32}, False, "model.hidden_size must be that of the pretrained model, 16, got 32"),
        ({"norm_eps": 1e-5}, False, "model.norm_eps must be that of the pretrained model, 1e-06, got 1e-05"),
        ({"tie_embeddings": True}, False, "model.tie_embeddings must be .* False, got True"),
        ({"num_layers": 6}, False, "must be the 3 of the pretrained model, .* got 6 blocks, 0 of them attention"),
        ({"mixers": ("attention",), "rope_theta": 5.0}, False, "model.rope_theta must be .* 10000.0, got 5.0"),
        (
            {"mixers": ("attention",), "attention": AttentionConfig(num_kv_heads=4, head_dim=4)},
            False,
            "model.attention.num_kv_heads must be .* 2, got 4",
        ),
        ({}, True, "only where all of its attention stays: .* each of its 3 blocks, .* got 3 blocks of ttt_linear"),
    ],
)
def test_models_that_do_not_fit_are_one_line(llama, changes, zero, message):
    config = replace(pretrained_config(llama), **{"mixers": ("ttt_linear",), "backbone": "transformer", **changes})
    with pytest.raises(InputError, match=message) as error:
        warm_start(llama, config, zero_readout=zero)
    assert "\n" not in str(error.value)


def test_only_a_transformer_is_a_base():
    with pytest.raises(InputError, match="begins with attention and feed-forward blocks, got mamba"):
        warm_start(FIXTURES / "mamba", pretrained_config(FIXTURES / "mamba"))
