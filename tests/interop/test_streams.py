"""Streams of the official JAX trainer are read and written as flax writes them, and damage to one is one line."""

import json
import shutil
import tracemalloc
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tttlm
from tttlm.errors import InputError
from tttlm.interop.stream import Record, read_stream, write_stream
from tttlm.interop.tensors import Tensors, Written
from tttlm.model import ModelConfig, TTTConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_jax" / "ttt_linear"


def flax_stream(path: Path, arrays: dict) -> None:
    """The stream as the trainer writes it."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for key, value in arrays.items():
            file.write(packer.pack((key, flax.serialization.to_bytes(value))))


def flax_read(path: Path) -> dict:
    """The stream as the trainer reads it."""
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=0)
        return {tuple(key): flax.serialization.from_bytes(None, value) for key, value in unpacker}


def record(key: tuple[str, ...], array: np.ndarray) -> Record:
    return Record(key, Written("", array.shape, array.dtype, lambda: array))


def test_a_train_state_is_a_model_that_computes_what_the_official_one_does(x64):
    expected = load_file(FIXTURE / "expected.safetensors")
    model = tttlm.from_pretrained(FIXTURE, param_dtype="float64")
    logits = model(jnp.asarray(expected["input_ids"], jnp.int32))
    scale = np.abs(expected["logits"]).max()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5 * scale)


def test_a_folder_goes_out_as_it_came_in_and_to_the_other_layout_and_back(tmp_path):
    model = tttlm.from_pretrained(FIXTURE, param_dtype="bfloat16")
    tttlm.save_pretrained(model, tmp_path / "state", train_state=True)
    before, after = flax_read(FIXTURE / "streaming_train_state"), flax_read(tmp_path / "state/streaming_train_state")
    assert set(before) == set(after)
    for key in before:
        assert np.shape(before[key]) == np.shape(after[key])
        assert before[key].dtype == after[key].dtype
        if key[0] == "params":
            np.testing.assert_array_equal(before[key], after[key], err_msg=str(key))
    values = json.loads((FIXTURE / "model_config.json").read_text())
    assert json.loads((tmp_path / "state/model_config.json").read_text()) == values
    tttlm.save_pretrained(model, tmp_path / "hf", layout="huggingface")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["max_position_embeddings"]) == (1, 2, 80)
    again = tttlm.from_pretrained(tmp_path / "hf", param_dtype="bfloat16")
    tttlm.save_pretrained(again, tmp_path / "back", layout="official_jax")
    back = flax_read(tmp_path / "back/streaming_params")
    assert set(back) == {key[2:] for key in before if key[0] == "params"}
    for key, value in back.items():
        np.testing.assert_array_equal(value, before["params", "params", *key])
    values = json.loads((tmp_path / "back/model_config.json").read_text())
    assert (values["max_sequence_length"], values["seq_modeling_block"]) == (80, "ttt_linear")


@pytest.mark.parametrize("mixer", ["ttt_mlp", "attention"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_block_of_the_trainer_goes_out_and_comes_in(tmp_path, mixer, tied):
    config = ModelConfig(
        vocab_size=19,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=12,
        mixers=(mixer,),
        backbone="transformer",
        tie_embeddings=tied,
        ttt=TTTConfig(mini_batch_size=4),
    )
    model = tttlm.LanguageModel(config, rngs=nnx.Rngs(0))
    tttlm.save_pretrained(model, tmp_path / "model", layout="official_jax")
    keys = {key[-2:] if key[-1] == "kernel" else key[-1:] for key in flax_read(tmp_path / "model/streaming_params")}
    assert (("lm_head", "kernel") in keys) != tied
    assert ("wk", "kernel") in keys
    again = tttlm.from_pretrained(tmp_path / "model")
    for (path, a), (_, b) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))
    kind = json.loads((tmp_path / "model/model_config.json").read_text())["seq_modeling_block"]
    assert kind == {"ttt_mlp": "ttt_mlp_base", "attention": "self_attention"}[mixer]


def test_heads_that_the_trainer_turns_in_pairs_attend_as_ours_in_halves(tmp_path):
    """Scores of its attention by its definition: neighbours are complex numbers, turned by their position."""
    config = ModelConfig(
        vocab_size=19, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=8, mixers=("attention",)
    )
    model = tttlm.LanguageModel(config, rngs=nnx.Rngs(0))
    tttlm.save_pretrained(model, tmp_path / "model", layout="official_jax")
    arrays = flax_read(tmp_path / "model/streaming_params")
    x, time = np.random.default_rng(0).normal(size=(5, 16)), np.arange(5)[:, None, None]

    def turned(name):
        pairs = (x @ arrays["model", "h", "0", "seq_modeling_block", name, "kernel"]).reshape(5, 2, 4, 2)
        angles = time * 10_000.0 ** (-np.arange(4) / 4)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)

    theirs = np.einsum("qhp,khp->hqk", turned("wq"), turned("wk").conj()).real
    layer = nnx.merge(*nnx.split(model)).stack.blocks[0].mixer
    one = nnx.merge(nnx.graphdef(layer), nnx.map_state(lambda _, v: v.replace(v[...][0]), nnx.state(layer)))
    q, k, _ = one._project(jnp.asarray(x[None], jnp.float32), jnp.arange(5))
    np.testing.assert_allclose(np.einsum("qhd,khd->hqk", q[0], k[0]), theirs, atol=2e-5)


ARRAYS = {
    ("step",): np.int32(7),
    ("params", "scalar"): np.float32(2).reshape(()),
    ("a/b", "one"): np.ones(1, np.int8),
    ("fixed", "16"): np.arange(1, dtype=np.uint8),
    ("bf16",): np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    ("k" * 40, "long"): np.arange(300.0).reshape(3, 100),
    ("empty",): np.zeros((0, 3), np.float32),
    ("large",): np.arange(20_000, dtype=np.int32).reshape(2, 100, 100),
}


@pytest.mark.parametrize("chunk_bytes", [2**30, 1000])
def test_what_is_written_is_byte_for_byte_what_flax_writes(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk_bytes)
    arrays = {key: np.asarray(value) for key, value in ARRAYS.items()}
    for size in (0, 1, 2, 3, 4, 5, 7, 8, 9, 240, 241, 242, 243, 250, 255, 256, 65_500, 65_530, 65_536):
        arrays["size", str(size)] = np.zeros(size, np.uint8)
    flax_stream(tmp_path / "flax", arrays)
    records = [record(key, value) for key, value in arrays.items()]
    write_stream(tmp_path / "ours", records, chunk_bytes=chunk_bytes)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "flax").read_bytes()
    where = read_stream(tmp_path / "flax")
    assert list(where) == list(arrays)
    floats = {".".join(key): tensor for key, tensor in where.items() if "float" in tensor.dtype}
    tensors = Tensors(tmp_path, floats)
    for name in floats:
        wanted = next(value for key, value in arrays.items() if ".".join(key) == name)
        np.testing.assert_array_equal(tensors.read(name, wanted.shape), wanted)
    assert (len(where["large",].pieces) > 1) == (chunk_bytes == 1000)


def test_a_number_of_python_may_stand_for_the_step(tmp_path):
    flax_stream(tmp_path / "stream", {("step",): 5, ("x",): np.ones(2, np.float32), ("y",): np.float32(1)})
    assert read_stream(tmp_path / "stream")["step",].dtype == "int"


def refusal(path: Path) -> str | None:
    """Why a stream is refused; None where it is read."""
    try:
        read_stream(path)
    except InputError as error:
        return str(error)
    return None


def test_a_stream_that_is_cut_anywhere_or_altered_anywhere_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "stream"
    flax_stream(path, {key: ARRAYS[key] for key in [("step",), ("bf16",), ("a/b", "one")]})
    data, read, messages = path.read_bytes(), 0, []
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        message = refusal(path)
        assert message is None or f"of {cut:,}; fetch it again" in message
        read += message is None
    assert read == 2  # between two records, where nothing tells that more are to come
    for position in range(len(data)):
        for value in (0x00, 0x81, 0x93, 0xA5, 0xC1, 0xC6, 0xC9, 0xD3, 0xDB, 0xDD, 0xDF, 0xFF):
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            messages.append(refusal(path))
    messages = [message for message in messages if message is not None]
    assert len(messages) > 4 * len(data)
    assert not any("\n" in message for message in messages)


def test_a_stream_is_read_and_written_in_the_memory_of_one_array(tmp_path):
    arrays = {("a", str(i)): np.full((1024, 1024), i, np.float32) for i in range(6)}
    path = tmp_path / "stream"
    tracemalloc.start()
    write_stream(path, (record(key, value) for key, value in arrays.items()))
    assert tracemalloc.get_traced_memory()[1] < 1e6  # nothing is copied
    tracemalloc.reset_peak()
    where = read_stream(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tensors = Tensors(tmp_path, {".".join(key): tensor for key, tensor in where.items()})
    for i in range(6):
        assert tensors.read(f"a.{i}", (1024, 1024))[-1, -1] == i
    assert tracemalloc.get_traced_memory()[1] < 2.2 * 2**22
    tracemalloc.stop()


def test_what_a_folder_lacks_or_has_too_much_is_named(tmp_path):
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "model"))

    def refused(message):
        with pytest.raises(InputError, match=message) as error:
            tttlm.from_pretrained(folder)
        assert "\n" not in str(error.value)

    (folder / "streaming_params").write_bytes(b"\x92")
    refused("one stream is needed .* but there are streaming_params, streaming_train_state")
    (folder / "streaming_train_state").unlink()
    refused(r"streaming_params: cut off within record 1, which begins at byte 0 of 1")
    (folder / "streaming_params").write_bytes(b"")
    refused("is empty")
    flax_stream(folder / "streaming_params", {("model", "wte", "embedding"): np.ones((101, 64), np.float32)})
    refused("model_config.json says num_hidden_layers = 2, but the folder holds 1 tensors in all")
    shutil.copy(FIXTURE / "streaming_train_state", folder)
    (folder / "streaming_params").unlink()
    values = json.loads((FIXTURE / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(values | {"vocab_size": 100}))
    refused(r"'model.wte.embedding' has shape \[101, 64\] of bfloat16, but model_config.json asks for \[100, 64\]")
    (folder / "model_config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    refused("'lm_head.kernel' is missing")
    (folder / "model_config.json").write_text(json.dumps(values | {"hidden_size": "64"}))
    refused("model_config.json: hidden_size must be a whole number")
    (folder / "model_config.json").write_text(json.dumps(values | {"seq_modeling_block": "conv"}))
    refused("seq_modeling_block must be one of ttt_linear, .*, got 'conv'")
    (folder / "model_config.json").unlink()
    (folder / "metadata.pkl").write_bytes(b"")
    refused("model_config.json: is missing .metadata.pkl, which holds it too, is a pickle and never opened")
