"""Released checkpoints give what their reference gives, and go out as they came in."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tttlm
from tttlm.errors import InputError
from tttlm.interop.checkpoint import ARCHITECTURES
from tttlm.model import AttentionConfig, Mamba2Config, MambaConfig, ModelConfig, TTTConfig

FOLDERS = [
    "ttt_linear_transformer",
    "ttt_mlp_transformer",
    "ttt_linear_mamba",
    "ttt_mlp_mamba",
    "llama",
    "mamba",
    "mamba2",
]


def gradients_under_released_names(gradient: tttlm.LanguageModel, folder: Path) -> dict[str, np.ndarray]:
    """The gradient of a model is a model: written out, it has the names of the checkpoint."""
    tttlm.save_pretrained(gradient, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_every_gradient_agree_with_the_reference(parity, x64, tmp_path, name):
    folder = parity / name
    expected = load_file(folder / "expected.safetensors")
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    model = tttlm.from_pretrained(folder, param_dtype="float64")
    graph, parameters = nnx.split(model)

    @jax.jit
    def run(parameters):
        def loss(parameters):
            logits = nnx.merge(graph, parameters)(tokens)
            # Most references take the loss of float32 logits.
            scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
            return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)), logits

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (loss, logits), gradient = run(parameters)
    np.testing.assert_allclose(logits, expected["logits"], rtol=3e-7, atol=3e-7 * np.abs(expected["logits"]).max())
    np.testing.assert_allclose(loss, expected["loss"][0], rtol=1e-6)
    ours = gradients_under_released_names(nnx.merge(graph, gradient), tmp_path / "gradient")
    theirs = {key.removeprefix("grad/"): value for key, value in expected.items() if key.startswith("grad/")}
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6 * np.abs(value).max(), err_msg=key)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_released_folder_goes_out_as_it_came_in(parity, tmp_path, name):
    folder = parity / name
    tttlm.save_pretrained(tttlm.from_pretrained(folder), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    values, written = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    assert {key: values[key] for key in written if key in values and key not in ("architectures",)} == {
        key: written[key] for key in written if key in values and key not in ("architectures",)
    }


@pytest.fixture
def model():
    config = ModelConfig(
        vocab_size=37,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        mixers=("ttt_mlp",),
        tie_embeddings=False,
        rope_theta=500.0,
        ttt=TTTConfig(mini_batch_size=4),
    )
    return tttlm.LanguageModel(config, rngs=nnx.Rngs(0))


def same_parameters(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_sharded_folders_are_written_and_read(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path, shard_bytes=3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    again = tttlm.from_pretrained(tmp_path)
    same_parameters(model, again)
    assert again.config.rope_theta == 500.0
    tokens = jnp.arange(20)[None] % 37
    np.testing.assert_array_equal(model(tokens), again(tokens))


def broken(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NORM = "model.layers.1.seq_norm.weight"
FAULTS = {
    "missing tensor": (lambda f: broken(f, lambda t: t.pop(NORM)), rf"'{NORM}' is missing.*\[16\]"),
    "wrong shape": (
        lambda f: broken(f, lambda t: t.update({NORM: np.zeros(5, np.float32)})),
        rf"'{NORM}' has shape \[5\].*\[16\]",
    ),
    "unknown tensor": (lambda f: broken(f, lambda t: t.update(extra=np.zeros(5, np.float32))), "'extra' is no part"),
    "no header": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
        "cut off within its header: it has 100 bytes",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"{" * 400), "no whole safetensors file"),
    "unknown architecture": (lambda f: edit_config(f, model_type="bert"), "unknown model_type 'bert'.*ttt"),
    "architecture is no name": (lambda f: edit_config(f, model_type=["ttt"]), r"unknown model_type \['ttt'\]"),
    "width is a word": (lambda f: edit_config(f, hidden_size="16"), "hidden_size must be a whole number.*'16'"),
    "negative size": (lambda f: edit_config(f, num_hidden_layers=-2), "num_hidden_layers must be a whole number.*-2"),
    "epsilon is a word": (lambda f: edit_config(f, rms_norm_eps="small"), "rms_norm_eps must be a positive number"),
    "gate is a number": (lambda f: edit_config(f, use_gate=1), "use_gate must be true or false, got 1"),
    "heads do not fit": (
        lambda f: edit_config(f, num_attention_heads=3),
        "even head dimensions, got hidden_size 16 and num_heads 3",
    ),
    "unknown inner model": (lambda f: edit_config(f, ttt_layer_type="conv"), "ttt_layer_type must be"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "configuration is no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no width": (lambda f: edit_config(f, hidden_size=None), r"config.json asks for \[37, 2048\]"),
    "only a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is never opened",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_refused_in_one_line_that_says_what(model, tmp_path, fault):
    tttlm.save_pretrained(model, tmp_path / "model")
    breaks, message = FAULTS[fault]
    breaks(tmp_path / "model")
    with pytest.raises(InputError, match=message) as error:
        tttlm.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)


SMALL = ModelConfig(vocab_size=37, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
FAMILIES = {
    "ttt": SMALL,
    "llama": dataclasses.replace(SMALL, mixers=("attention",), tie_embeddings=False),
    "mamba": dataclasses.replace(SMALL, mixers=("mamba",), intermediate_size=0),
    "mamba2": dataclasses.replace(
        SMALL, mixers=("mamba2",), intermediate_size=0, mamba2=Mamba2Config(state_size=4, head_dim=8)
    ),
}
BIASED = {
    "llama": {"attention": AttentionConfig(use_bias=True), "feed_forward_bias": True},
    "mamba": {"mamba": MambaConfig(use_bias=True, conv_bias=False)},
    "mamba2": {"mamba2": Mamba2Config(state_size=4, head_dim=8, use_bias=True, conv_bias=False, dt_limit=(0.01, 0.02))},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A folder of every family."""
    folder = tmp_path_factory.mktemp("written")
    for family, config in FAMILIES.items():
        tttlm.save_pretrained(tttlm.LanguageModel(config, rngs=nnx.Rngs(0)), folder / family)
    return {family: folder / family for family in FAMILIES}


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_missed_and_measured_under_its_name(written, tmp_path, family):
    """Of every family the first, the last and the largest tensor: missing, of another shape or kind, or cut off."""
    tensors = load_file(written[family] / "model.safetensors")
    folder = tmp_path / "model"
    shutil.copytree(written[family], folder)
    names = sorted(tensors)

    def refused(change, message):
        broken_tensors = dict(tensors)
        change(broken_tensors)
        save_file(broken_tensors, folder / "model.safetensors")
        with pytest.raises(InputError, match=message) as error:
            tttlm.from_pretrained(folder)
        assert "\n" not in str(error.value)

    for name in (names[0], names[-1], max(names, key=lambda name: tensors[name].size)):
        shape, there = list(tensors[name].shape), re.escape(repr(name))
        refused(lambda t, n=name: t.pop(n), rf"{there} is missing; expected one of shape {re.escape(str(shape))}")
        wrong = np.zeros([*shape, 2], np.float32)
        refused(
            lambda t, n=name, w=wrong: t.update({n: w}),
            rf"{there} has shape {re.escape(str([*shape, 2]))} of float32.*{re.escape(str(shape))}",
        )
        whole = np.zeros(shape, np.int32)
        refused(lambda t, n=name, w=whole: t.update({n: w}), rf"{there} has shape .* of int32.*floating-point")
    refused(lambda t: t.update(extra=np.zeros(3, np.float32)), "'extra' is no part of the model")
    data = (written[family] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(InputError, match=rf"cut off within tensor .*has {len(data) - 5:,} bytes of {len(data):,}"):
        tttlm.from_pretrained(folder)


@pytest.mark.parametrize("family", BIASED)
def test_what_a_configuration_adds_goes_out_and_comes_in_and_matters(tmp_path, family):
    """Biases, a convolution without one, clipped step sizes."""
    config = dataclasses.replace(FAMILIES[family], **BIASED[family])
    model = tttlm.LanguageModel(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype("f"), nnx.state(model)))
    tttlm.save_pretrained(model, tmp_path / "model")
    again = tttlm.from_pretrained(tmp_path / "model")
    same_parameters(model, again)
    tokens = jnp.arange(20)[None] % 37
    np.testing.assert_array_equal(model(tokens), again(tokens))
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert any(name.endswith(("q_proj.bias", "in_proj.bias")) for name in names)
    assert not any("conv1d.bias" in name for name in names)
    if family == "mamba2":
        edit_config(tmp_path / "model", time_step_limit=[0.0, "inf"])
        assert not np.allclose(model(tokens), tttlm.from_pretrained(tmp_path / "model")(tokens))


OTHER_COMPUTATIONS = {
    "llama": [
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rotary embeddings of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary embeddings of type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"sliding_window": 64}, "sliding_window is not supported, got 64"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"attention_bias": True}, r"q_proj\.bias' is missing"),
        ({"head_dim": 10}, "has shape .* but config.json asks for"),
    ],
    "mamba": [
        ({"hidden_act": "relu"}, "hidden_act must be 'silu'"),
        ({"intermediate_size": 48}, "intermediate_size must be 32, got 48"),
        ({"use_bias": True}, r"in_proj\.bias' is missing"),
        ({"use_conv_bias": False}, r"conv1d\.bias' is no part"),
        ({"time_step_rank": "some"}, "time_step_rank must be a whole number"),
    ],
    "mamba2": [
        ({"rms_norm": False}, "rms_norm must be True, got False"),
        ({"num_heads": 3}, "num_heads must be expand"),
        ({"time_step_limit": 3}, "time_step_limit must be two numbers, got 3"),
        ({"time_step_limit": [0.2, 0.1]}, "dt_limit is a smallest and a largest step size"),
        ({"attention_layers_idx": [1]}, r"attention_layers_idx is not supported, got \[1\]"),
    ],
    "ttt": [({"rope_scaling": {"type": "linear"}}, "rope_scaling is not supported")],
}


@pytest.mark.parametrize("family", OTHER_COMPUTATIONS)
def test_a_field_that_asks_for_another_computation_is_honoured_or_refused(written, tmp_path, family):
    for number, (changes, message) in enumerate(OTHER_COMPUTATIONS[family]):
        folder = tmp_path / str(number)
        shutil.copytree(written[family], folder)
        edit_config(folder, **changes)
        with pytest.raises(InputError, match=message) as error:
            tttlm.from_pretrained(folder)
        assert "\n" not in str(error.value)


def test_a_shard_that_is_missing_is_named(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path, shard_bytes=3000)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-.*missing"):
        tttlm.from_pretrained(tmp_path)


def test_a_tensor_that_the_index_passes_over_is_named(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path, shard_bytes=3000)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = index["weight_map"]
    name, first, last = next(iter(names)), "model-00001", sorted(set(names.values()))[-1]
    bad = [
        ({n: f for n, f in names.items() if n != name}, rf"{first}.*tensor '{name}' is in it, but .* does not name it"),
        ({n: f for n, f in names.items() if f != last}, rf"{last}: .* names no tensor of it"),
    ]
    for weight_map, words in bad:
        file.write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(InputError, match=words):
            tttlm.from_pretrained(tmp_path)
    file.write_text(json.dumps(index))
    copied = load_file(tmp_path / last) | {name: np.zeros(3, np.float32)}
    save_file(copied, tmp_path / last)
    with pytest.raises(InputError, match=rf"{last}: tensor '{name}' is in it, but .* names {first}.* for it"):
        tttlm.from_pretrained(tmp_path)
    tttlm.save_pretrained(model, tmp_path / "one")  # which `transformers` reads where there are both
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model.safetensors")
    same_parameters(model, tttlm.from_pretrained(tmp_path))


def test_nothing_is_overwritten(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path)
    with pytest.raises(InputError, match="holds a checkpoint already"):
        tttlm.save_pretrained(model, tmp_path)
    shutil.rmtree(tmp_path)


def test_a_hybrid_has_no_released_layout(tmp_path):
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=1, intermediate_size=8, mixers=("ttt_linear", "ttt_mlp")
    )
    with pytest.raises(InputError, match="no released layout"):
        tttlm.save_pretrained(tttlm.LanguageModel(config, rngs=nnx.Rngs(0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def retensor(folder: Path, **tensors) -> None:
    there = load_file(folder / "model.safetensors")
    save_file(there | tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["ttt", "mamba"])
def test_a_head_that_a_folder_holds_is_compared_with_the_embedding_before_it_is_left_out(written, tmp_path, family):
    folder = Path(shutil.copytree(written[family], tmp_path / "model"))
    name = next(n for n in load_file(folder / "model.safetensors") if "embed" in n)
    embedding = load_file(folder / "model.safetensors")[name]
    retensor(folder, **{"lm_head.weight": embedding.copy()})
    same_parameters(tttlm.from_pretrained(folder), tttlm.from_pretrained(written[family]))
    embedding[3, 4] += 1
    retensor(folder, **{"lm_head.weight": embedding})
    for values in ({}, {"tie_word_embeddings": None}):
        edit_config(folder, **values)
        with pytest.raises(InputError, match=r"'lm_head.weight' is not the embedding, but config.json ties"):
            tttlm.from_pretrained(folder)
    edit_config(folder, tie_word_embeddings=False)
    np.testing.assert_array_equal(tttlm.from_pretrained(folder).lm_head.embedding[...], embedding)


def test_constants_that_a_folder_holds_are_compared_too(written, tmp_path):
    folder = Path(shutil.copytree(written["llama"], tmp_path / "model"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    retensor(folder, **{name: (10_000.0 ** (-np.arange(4) / 4)).astype(np.float32)})
    tttlm.from_pretrained(folder)
    retensor(folder, **{name: (500_000.0 ** (-np.arange(4) / 4)).astype(np.float32)})
    with pytest.raises(InputError, match=r"inv_freq' holds other values than config.json makes \(rope_theta = 10000"):
        tttlm.from_pretrained(folder)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, np.uint16, np.bool_, np.complex64]
)
def test_a_tensor_of_a_dtype_that_is_not_read_is_one_line(written, tmp_path, dtype):
    folder = Path(shutil.copytree(written["ttt"], tmp_path / "model"))
    retensor(folder, **{NORM: np.ones(16).astype(dtype)})
    with pytest.raises(InputError, match=NORM) as error:
        tttlm.from_pretrained(folder)
    assert "\n" not in str(error.value)


# The values of `transformers` 5.24 (configuration_*.py) and of the released TTT code.
DEFAULTS = {
    "llama": (32_000, 4096, 32, 32, 11_008, False),
    "mamba": (50_280, 768, 32, None, 0, True),
    "mamba2": (32_768, 4096, 64, None, 0, False),
    "ttt": (32_000, 2048, 24, 32, 5504, True),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_config_json_leaves_out_has_the_defaults_of_transformers(family):
    config = ARCHITECTURES[family].config({"model_type": family})
    heads = config.num_heads if family in ("llama", "ttt") else None
    found = (config.vocab_size, config.hidden_size, config.num_layers, heads, config.intermediate_size)
    assert (*found, config.tie_embeddings) == DEFAULTS[family]
    if family == "mamba2":
        assert (config.mamba2.num_groups, config.mamba2.head_dim, config.mamba2.state_size) == (8, 64, 128)


def test_absurd_sizes_are_one_line_in_no_time(written, tmp_path):
    folder = Path(shutil.copytree(written["ttt"], tmp_path / "model"))
    edit_config(folder, num_hidden_layers=2**20)
    with pytest.raises(InputError, match="num_hidden_layers = 1048576, but the folder holds"):
        tttlm.from_pretrained(folder)


def test_an_index_that_points_out_of_the_folder_is_refused(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path, shard_bytes=3000)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(InputError, match="which is no file name in this folder"):
        tttlm.from_pretrained(tmp_path)
