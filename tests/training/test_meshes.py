"""Every layer trains the same on every mesh of eight devices, and its compiled program shards what it should."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.meshes import CHUNK, LENGTH, ROWS, VOCABULARY, WIDTH
from tests.training.small import small_config
from tttlm.errors import InputError
from tttlm.planning.explain import explain
from tttlm.training.config import MeshConfig
from tttlm.training.sharding import check_mesh, imagined_mesh

ONE = "data=1"
WHOLE = ("token_scale", "_norm/scale", "o_proj/bias", "out_proj/bias", "down_proj/bias")  # as they are used
BIASES = {"model.attention.use_bias": True, "model.mamba2.use_bias": True, "model.feed_forward_bias": True}
LAYERS = {
    "ttt_linear, mamba backbone": {"model.mixers": ["ttt_linear"]},
    "ttt_linear, transformer backbone": {"model.mixers": ["ttt_linear"], "model.backbone": "transformer"},
    "ttt_mlp, mamba backbone": {"model.mixers": ["ttt_mlp"]},
    "ttt_mlp, transformer backbone": {"model.mixers": ["ttt_mlp"], "model.backbone": "transformer"},
    "attention": {"model.mixers": ["attention"], "model.attention.num_kv_heads": 2},
    "sliding_attention": {"model.mixers": ["sliding_attention"], "model.attention.qk_norm": True, **BIASES},
    "mamba": {"model.mixers": ["mamba"], "model.intermediate_size": 0},
    "mamba2": {"model.mixers": ["mamba2"], "model.intermediate_size": 0, "model.mamba2.num_groups": 2, **BIASES},
    "hybrid": {"model.mixers": ["ttt_linear", "sliding_attention"], "model.tie_embeddings": False},
}
MESHES = (
    *("data=8", "fsdp=8", "tensor=8", "context=8", "tensor=4,data=2", "context=4,tensor=2", "fsdp=4,accumulate=2"),
    *("data=2,fsdp=2,context=2", "fsdp=2,tensor=2,context=2", "data=2,tensor=2,context=2"),
)


def run(changes: dict, *meshes: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.training.meshes", json.dumps(changes), *meshes]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(runs: dict[str, dict], tolerance: float = 1e-5) -> None:
    """What holds for runs of one model on several meshes, the first of which is one device."""
    losses = runs[ONE]["losses"]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.01
    assert "the first that" in runs[ONE]["fault"]
    for axes, found in runs.items():
        assert found["losses"] == pytest.approx(losses, abs=tolerance, rel=0), axes
        assert found["telemetry"] == pytest.approx(runs[ONE]["telemetry"], rel=10 * tolerance), axes
        assert found["fault"] == runs[ONE]["fault"], axes
        size = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "accumulate": 1}
        size |= {name: int(value) for name, value in (axis.split("=") for axis in axes.split(","))}
        check_shards(found, size["fsdp"] * size["context"], size["tensor"])
        check_exchanges(found, size)


def check_shards(found: dict, storage: int, tensor: int) -> None:
    """Matrices are whole nowhere; of vectors those of heads and channels are shared, and the scales of norms whole."""
    assert found["donated"]
    assert found["in"] == found["out"]
    for path, (shape, share) in found["in"].items():
        dimensions = len(shape) - ("stack/" in path)
        times = math.prod(shape) / math.prod(share)
        if dimensions > 1:
            assert times == storage * tensor, f"{path} {shape} lies on a device as {share}"
        elif ("mixer/" in path or "feed_forward/" in path) and not path.endswith(WHOLE):
            assert times == tensor, f"{path} {shape} lies on a device as {share}"
        elif dimensions == 1:
            assert path.endswith((*WHOLE, "norm/scale", "conv/bias")), path


def check_exchanges(found: dict, size: dict[str, int]) -> None:
    """Tokens are exchanged for heads, never gathered; logits are of a chunk, and stay where they are made."""
    kinds = {kind for kind, _ in found["collectives"]}
    rows = ROWS // (size["data"] * size["fsdp"] * size["accumulate"])
    parameters = [shape["stack/" in path :] for path, (shape, _) in found["in"].items()]
    if size["context"] > 1:
        assert "all-to-all" in kinds
    for kind, shape in found["collectives"]:
        shape = [n for n in shape if n > 1]
        if kind == "all-gather" and len(shape) > 2 and shape not in parameters:
            assert math.prod(shape) < rows * LENGTH * WIDTH, f"the stream is gathered: {shape}"
            assert shape[-1] != VOCABULARY, f"logits are gathered: {shape}"
    most = rows * CHUNK * VOCABULARY // size["tensor"]
    assert max(math.prod(shape) for shape in found["arrays"]) == most


@pytest.mark.long
@pytest.mark.parametrize(
    "mixers",
    [["ttt_linear", "attention"], pytest.param(["ttt_linear", "attention", "mamba", "mamba2"], marks=pytest.mark.slow)],
    ids=len,
)
def test_layers_of_every_kind_train_the_same_on_a_mesh_of_all_axes(mixers):
    changes = {"model.num_layers": len(mixers), "model.mixers": mixers, "model.attention.num_kv_heads": 2}
    check(run(changes, ONE, "fsdp=2,tensor=2,context=2,accumulate=2"))


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_trains_the_same_on_every_mesh(layer):
    check(run(LAYERS[layer], ONE, *MESHES))


@pytest.mark.slow
def test_a_context_of_128k_tokens_trains_on_eight_devices_with_a_share_of_the_memory():
    row = {"sequence_length": 131072, "batch_size": 1, "steps": 2, "loss_chunk": 2048}
    model = {"model.mixers": ["ttt_linear"], "model.num_layers": 1, "model.ttt.mini_batch_size": 64}
    runs = run({**row, **model}, ONE, "context=8")
    assert runs["context=8"]["losses"] == pytest.approx(runs[ONE]["losses"], abs=1e-5, rel=0)
    assert runs["context=8"]["temporary"] < runs[ONE]["temporary"] / 6


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["ttt_linear", "mamba2"])
def test_bfloat16_with_float32_weights_trains_on_a_mesh_as_on_one_device(mixer):
    check(run({"model.mixers": [mixer], "model.dtype": "bfloat16"}, ONE, "fsdp=2,tensor=2,context=2"), 2e-2)


@pytest.mark.parametrize(
    ("changes", "axes", "words"),
    [
        ({"model.num_heads": 4}, {"tensor": 2, "context": 4}, "the 4 heads of attention .* 2 x 4"),
        ({"model.mixers": ("mamba",), "model.hidden_size": 6}, {"tensor": 8}, "the 12 channels of mamba .* 8 x 1"),
        ({"sequence_length": 36}, {"context": 8}, "sequence_length = 36 is not divisible by mesh.context = 8"),
        ({"batch_size": 6}, {"fsdp": 4}, "6 examples is not divisible by mesh.data x mesh.fsdp = 4"),
        ({"model.num_heads": 8, "loss_chunk": 12, "sequence_length": 48}, {"context": 2, "tensor": 2}, None),
        (
            {"model.num_heads": 8, "loss_chunk": 16, "sequence_length": 48},
            {"context": 2},
            "loss_chunk = 16 .* 24 tokens",
        ),
        ({"model.mixers": ("ttt_linear",), "model.num_heads": 8}, {"context": 16}, "holds 2 tokens .* convolution"),
    ],
)
def test_what_a_mesh_cannot_share_is_refused_in_one_line(changes, axes, words):
    config = small_config(mesh=MeshConfig(**{"fsdp": 1, **axes}), **changes)
    mesh = imagined_mesh(config.mesh)
    if words is None:
        return check_mesh(mesh, config)
    with pytest.raises(InputError, match=words) as error:
        check_mesh(mesh, config)
    assert "\n" not in str(error.value)


def test_explain_counts_what_a_device_of_a_larger_machine_holds():
    config = small_config(mesh=MeshConfig(fsdp=4, tensor=2))
    lines = explain(config)
    rows = {line.split()[0]: line for line in lines if line.startswith(("params/", "opt_state/"))}
    assert "8 devices" in lines[0]
    for place in ("params", "opt_state/1/mu", "opt_state/1/nu"):
        row = rows[f"{place}/stack/blocks/0/mixer/q_proj/kernel"]
        assert "2 x 16 x 16" in row
        assert "-, fsdp, tensor" in row
        assert row.endswith(f" {2 * 16 * 16 * 4 // 8}")
    assert rows["params/norm/scale"].split()[-2:] == ["replicated", "64"]
    assert all(any(line.startswith(part) for line in lines) for part in ("parameters ", "optimiser state ", "all "))
