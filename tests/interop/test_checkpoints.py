"""Released checkpoints give what their reference gives, and go out as they came in."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tttlm
from tttlm.errors import InputError
from tttlm.model import ModelConfig, TTTConfig

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
def test_logits_and_every_gradient_agree_with_the_reference(shared, x64, tmp_path, name):
    folder = shared / "parity" / name
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
def test_a_released_folder_goes_out_as_it_came_in(shared, tmp_path, name):
    folder = shared / "parity" / name
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
        width=16,
        layers=2,
        heads=2,
        feed_forward=24,
        mixers=("ttt_mlp",),
        tie_embeddings=False,
        rope_base=500.0,
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
    assert again.config.rope_base == 500.0
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
    "truncated file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "no whole safetensors file",
    ),
    "unknown architecture": (lambda f: edit_config(f, model_type="bert"), "unknown model_type 'bert'.*ttt"),
    "unknown inner model": (lambda f: edit_config(f, ttt_layer_type="conv"), "ttt_layer_type must be"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "there is no such file"),
    "configuration is no JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "no width": (lambda f: edit_config(f, hidden_size=None), "no 'hidden_size'"),
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


def test_a_shard_that_is_missing_is_named(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path, shard_bytes=3000)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-.*missing"):
        tttlm.from_pretrained(tmp_path)


def test_nothing_is_overwritten(model, tmp_path):
    tttlm.save_pretrained(model, tmp_path)
    with pytest.raises(InputError, match="holds a checkpoint already"):
        tttlm.save_pretrained(model, tmp_path)
    shutil.rmtree(tmp_path)


def test_a_hybrid_has_no_released_layout(tmp_path):
    config = ModelConfig(vocab_size=11, width=8, layers=2, heads=1, feed_forward=8, mixers=("ttt_linear", "ttt_mlp"))
    with pytest.raises(InputError, match="no released layout"):
        tttlm.save_pretrained(tttlm.LanguageModel(config, rngs=nnx.Rngs(0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
