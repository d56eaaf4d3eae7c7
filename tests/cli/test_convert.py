"""The command that converts models: every way there and back gives the same tensors, and its check can fail."""

import errno
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import tttlm
from tttlm.cli import convert
from tttlm.errors import CannotWrite, InputError
from tttlm.interop import convert as library
from tttlm.interop.checkpoint import abstract_parameters
from tttlm.interop.convert import FolderParameters, streamed_logits
from tttlm.interop.stream import read_stream
from tttlm.model import ModelConfig
from tttlm.training.digests import digest_of, digests
from tttlm.training.run_parameters import RunParameters, write_run

FIXTURES = Path(__file__).parents[1] / "fixtures"
OFFICIAL = FIXTURES / "official_jax" / "ttt_linear"
QWEN = FIXTURES / "reference" / "qwen3"


def same_tensors(one: Path, other: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.long
def test_a_stream_becomes_a_folder_a_run_and_a_stream_again(tmp_path, capsys):
    assert convert.main([str(OFFICIAL), str(tmp_path / "hf")]) == 0
    out = capsys.readouterr().out
    assert "model.embed_tokens.weight" in out
    assert "model.wte.embedding" in out
    assert "[101, 64]" in out
    assert "bfloat16" in out
    assert "logits of 32 random tokens agree: they differ by 0 at most" in out
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "run"), "--layout", "run"]) == 0
    captured = capsys.readouterr()
    assert "stack/blocks/0/mixer/q_proj/kernel[1]" in captured.out
    assert "has no tokenizer" in captured.err
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    same_tensors(tmp_path / "hf", tmp_path / "back")
    assert convert.main([str(tmp_path / "back"), str(tmp_path / "stream"), "--train_state"]) == 0
    before, after = (
        read_stream(OFFICIAL / "streaming_train_state"),
        read_stream(tmp_path / "stream/streaming_train_state"),
    )
    assert {key: tensor[1:3] for key, tensor in before.items()} == {key: tensor[1:3] for key, tensor in after.items()}


@pytest.mark.long
def test_a_run_takes_its_tokenizer_along_and_can_be_read(tmp_path, capsys):
    folder = tmp_path / "released"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((QWEN / name).read_bytes())
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(64)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    assert convert.main([str(folder), str(tmp_path / "run"), "--check_tokens", "0"]) == 0  # Qwen's other layout
    from tttlm.evaluation.run import load_run

    run = load_run(tmp_path / "run")
    assert run.tokenizer().encode("w5") == [5]
    tokens = jnp.arange(20)[None]
    np.testing.assert_array_equal(run.model(tokens), tttlm.from_pretrained(folder, param_dtype="bfloat16")(tokens))
    capsys.readouterr()
    line = {"step": 0, "loss": 3.5, "tokens_seen": 12_345}
    (tmp_path / "run" / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps(line | {"step": 1, "loss": 9.0})
    )
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "out"), "--json"]) == 0
    damaged = RunParameters(tmp_path / "run")
    damaged._facts.params["norm/scale"] = "bfloat16:1"
    with pytest.raises(InputError, match=r"is damaged \(the values of params/norm/scale are not those"):
        damaged.read(("norm", "scale"), None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| training loss | 3.5 |" in card
    assert "| tokens seen | 12,345 |" in card
    report = json.loads(capsys.readouterr().out)
    assert report["largest_difference"] == 0
    assert {"name": "model.norm.weight", "source": "norm/scale", "shape": [32], "dtype": "bfloat16"} in report[
        "tensors"
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    same_tensors(folder, tmp_path / "out")


@pytest.mark.long
def test_a_run_is_written_with_one_parameter_in_memory(tmp_path):
    source = FolderParameters(QWEN)
    sizes, held = [0], []
    before = sum(a.nbytes for a in jax.live_arrays())

    def read(path, repeat):
        value = source.read(path, repeat)
        if not repeat:
            sizes.append(value.nbytes * (1 if repeat is None else source.config.repeats))
            gc.collect()
            held.append(sum(a.nbytes for a in jax.live_arrays()) - before)
        return value

    write_run(tmp_path / "run", source.config, read, None)
    assert sum(sizes) > 4 * max(sizes)
    assert max(held) <= 2 * max(sizes)
    run = RunParameters(tmp_path / "run")
    name = ("stack", "blocks", 0, "mixer", "q_proj", "kernel")
    np.testing.assert_array_equal(run.read(name, 1), source.read(name, 1))


class Repeated:
    """A model of a gigabyte whose values are the same few."""

    def __init__(self):
        sizes = {"vocab_size": 4096, "hidden_size": 1024, "num_layers": 50, "num_heads": 16, "intermediate_size": 2736}
        self.config = ModelConfig(**sizes, backbone="transformer", dtype="bfloat16", param_dtype="bfloat16")
        self.shapes = {path: p.shape for path, p in abstract_parameters(self.config)[1].items()}
        self.values = np.random.default_rng(0).normal(size=999).astype(jnp.bfloat16)

    def read(self, path, repeat):
        return np.resize(self.values, self.shapes[path] if repeat is None else self.shapes[path][1:])

    def dtype(self, path, repeat):
        return self.values.dtype

    def name(self, path, repeat):
        return "repeated"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official_jax", "run"])
def test_memory_is_that_of_two_of_the_largest_tensors(layout, tmp_path):
    """Peak memory of the process is under twice the largest tensor and 500 MB, with the check of the logits."""
    source = Repeated()
    written = library.convert(source, tmp_path / "from", "huggingface")
    total = sum(math.prod(tensor.shape) * 2 for tensor in written)
    stacked = max(math.prod(shape) * 2 for shape in source.shapes.values())
    largest = stacked if layout == "run" else max(math.prod(tensor.shape) * 2 for tensor in written)
    limit = 2 * largest + 500 * 10**6
    assert total > limit
    command = f"{sys.executable} -m tttlm.cli.convert {tmp_path}/from {tmp_path}/to --layout {layout}"
    measured = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    measured += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    done = subprocess.run(
        [sys.executable, "-c", measured, *command.split()], check=True, capture_output=True, text=True
    )
    for folder in ("from", "to"):
        shutil.rmtree(tmp_path / folder)
    assert total / 10 < int(done.stdout) < limit


def test_a_run_that_cannot_be_written_is_one_line_and_no_checkpoint(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.partial, "finalize", full)
    with pytest.raises(CannotWrite, match=r"checkpoints/0 could not be written \(No space left on device\)"):
        convert.main([str(QWEN), str(tmp_path / "run"), "--layout", "run"])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["qwen3", "mamba2", "smollm"])
def test_logits_of_one_block_at_a_time_are_those_of_the_model(name):
    folder, tokens = FIXTURES / "reference" / name, np.arange(30)[None]
    logits = streamed_logits(FolderParameters(folder), tokens)
    np.testing.assert_allclose(logits, tttlm.from_pretrained(folder)(jnp.asarray(tokens)), atol=2e-5)


def test_the_check_of_logits_can_fail(tmp_path, monkeypatch):
    """What is written is read back from the disk: here it is altered in between."""

    def altered(source, folder, layout, **options):
        written = original(source, folder, layout, **options)
        tensors = load_file(folder / "model.safetensors")
        norm = tensors["model.norm.weight"]
        tensors["model.norm.weight"] = (1.02 * norm.astype(np.float32)).astype(norm.dtype)
        save_file(tensors, folder / "model.safetensors")
        return written

    original = library.convert
    monkeypatch.setattr(library, "convert", altered)
    with pytest.raises(CannotWrite, match=r"computes other logits than .*: they differ by .*; do not use it"):
        convert.main([str(QWEN), str(tmp_path / "out"), "--layout", "huggingface"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint16"])
def test_an_array_has_the_same_digest_in_the_memory_of_the_host(dtype, monkeypatch):
    monkeypatch.setattr("tttlm.training.digests._PIECE", 50)
    array = np.random.default_rng(0).integers(0, 200, (7, 3, 11)).astype(jnp.dtype(dtype))
    assert digests({"x": jnp.asarray(array)}) == {"x": digest_of(array)}
    array[3, 1, 4] += 1
    assert digests({"x": jnp.asarray(array)}) == {"x": digest_of(array)}


@pytest.mark.long
@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.long), pytest.param(32, marks=pytest.mark.slow)])
def test_a_warm_start_is_a_run_with_the_first_logits_of_the_transformer(tmp_path, capsys, tokens):
    words = ["--mixers", "attention", "ttt_linear", "--zero_readout", "--check_tokens", str(tokens)]
    assert convert.main([str(FIXTURES / "reference" / "smollm"), str(tmp_path / "run"), *words]) == 0
    out = capsys.readouterr().out
    assert "block 1: mixer/v_proj/kernel  <-  model.layers.0.self_attn.v_proj.weight" in out
    assert "block 1: mixer/o_proj/kernel  zero" in out
    assert "block 3: mixer/learning_rate/kernel  new" in out
    assert ("logits of 32 random tokens agree" in out) == (tokens > 0)


def test_a_run_begins_from_a_stream_of_the_official_trainer(tmp_path):
    from tttlm.interop.checkpoint import Checkpoint
    from tttlm.training.config import TrainConfig
    from tttlm.training.starting import initial_params
    from tttlm.training.step import Model

    model = Checkpoint(OFFICIAL).config
    params = initial_params(TrainConfig(model=model, init_from=str(OFFICIAL)), "")
    abstract = Model(model).shapes
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = params(jax.tree.map(lambda x: x.update(sharding=here), abstract))
    wanted = tttlm.from_pretrained(OFFICIAL).embed.embedding[...]
    np.testing.assert_array_equal(placed["embed"]["embedding"], wanted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["only"], "name two folders, FROM and TO, got 1"),
        ([str(QWEN), "OUT", "--layout", "mamba_ssm"], "layout mamba_ssm has no model of mixers"),
        ([str(QWEN), "OUT", "--layout", "official_jax"], "neither grouped heads"),
        ([str(QWEN), "OUT", "--train_state"], "is for the layout official_jax, but TO has the layout run"),
        ([str(QWEN), "OUT", "--step", "3"], "--step names a checkpoint of a run"),
        ([str(QWEN), str(QWEN), "--layout", "huggingface"], "holds a checkpoint already"),
        ([str(QWEN), str(QWEN), "--layout", "run"], "is there and not empty"),
        ([str(QWEN), "OUT", "--zero_readout"], "--zero_readout is for a warm start"),
        ([str(QWEN), "OUT", "--mixers", "ttt_linear", "--zero_readout"], "only where all of its attention stays"),
        ([str(QWEN), "OUT", "--mixers", "ttt_linear", "--layout", "huggingface"], "a warm start makes a run"),
        ([str(QWEN), "OUT", "--mixers", "ttt_linear", "--json"], "json = True is not used in a warm start"),
        ([str(QWEN), "OUT", "--mixers", "ttt_linear", "--seed", "3"], "seed = 3 is not used in a warm start without"),
        ([str(QWEN), "OUT", "--backbone", "mamba"], "backbone = 'mamba' is not used without --mixers"),
        ([str(QWEN), "OUT", "--shard_bytes", "9"], "shard_bytes = 9 is not used in the layout run"),
        (["no/such/folder", "OUT"], "no/such/folder is no folder"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(tmp_path, words, message):
    with pytest.raises(InputError, match=message) as error:
        convert.main([str(tmp_path / "out") if word == "OUT" else word for word in words])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
