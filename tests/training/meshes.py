"""Trains a small run on each mesh named on the command line and prints, as JSON, its losses, what its layers tell of
themselves at the end, where a fault put into them is found, and its compiled program.

A program of its own, because the number of simulated devices is fixed when JAX starts:
`python -m tests.training.meshes '{"model.mixers": ["mamba"]}' MESH...`, a mesh being like `data=2,tensor=4`, or with
another field of the configuration in it, `fsdp=8,accumulate=2`. Changes for all of them go by dotted name, in JSON;
the key `import` names a module that registers a mixer from outside the package.
Rows hold several documents, and padding.
"""

import importlib
import json
import math
import re
import sys
from dataclasses import fields, replace

import jax
import numpy as np

from tests.training.small import small_config
from tttlm.data import Batch
from tttlm.planning.collectives import KINDS
from tttlm.training.config import MeshConfig, TrainConfig
from tttlm.training.diagnosis import diagnose
from tttlm.training.sharding import check_mesh, make_mesh, path_name, place_batch
from tttlm.training.step import Model, make_init, make_train_step
from tttlm.training.telemetry import make_telemetry, named

STEPS, ROWS, LENGTH, CHUNK, WIDTH, VOCABULARY = 20, 8, 32, 4, 64, 632
SMALL = {
    "steps": STEPS,
    "batch_size": ROWS,
    "sequence_length": LENGTH,
    "loss_chunk": CHUNK,
    "model.vocab_size": VOCABULARY,
    "model.hidden_size": WIDTH,
    "model.num_heads": 8,
    "model.intermediate_size": 32,
    "model.ttt.mini_batch_size": 4,
    "model.mamba2.head_dim": 16,
    "model.mamba2.state_size": 8,
    "model.attention.sliding_window": 7,
    "model.remat": "block",
}
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]")


def batches(config: TrainConfig):
    rng = np.random.default_rng(0)
    rows, length = config.batch_size, config.sequence_length
    for _ in range(config.steps):
        tokens = rng.integers(0, 20, (rows, length + 1)).cumsum(axis=1).astype(np.int32) % 300
        segments = (1 + (rng.random((rows, length)) < 0.1).cumsum(axis=1)).astype(np.int32)
        segments[:2, -5:] = 0
        weights = (segments > 0).astype(np.float32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], segments, weights)


def configured(changes: dict, axes: str) -> TrainConfig:
    values = {"fsdp": 1, **{name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}}
    mesh = MeshConfig(**{field.name: values.pop(field.name, 1) for field in fields(MeshConfig)})
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    return small_config(**{**SMALL, "mesh": mesh, **values, **changes})


def train(changes: dict, axes: str) -> dict[str, object]:
    config = configured(changes, axes)
    sizes = config.mesh
    count = math.prod((sizes.data, sizes.fsdp, sizes.tensor, sizes.context))
    mesh = make_mesh(sizes, jax.devices()[:count])
    check_mesh(mesh, config)
    model = Model(config.model)
    state = make_init(config, model, mesh)()
    place = place_batch(mesh)
    step = make_train_step(config, model, mesh).lower(state, place(next(batches(config)))).compile()
    found = facts(step, state)
    losses = []
    for batch in batches(config):
        state, numbers = step(state, place(batch))
        losses.append(float(numbers["loss"]))
    measure = make_telemetry(replace(config, accumulate=1), model, mesh)  # all of the batch, whatever the parts
    told = {"telemetry": named(measure(state.params, place(batch), STEPS))}
    state.params["stack"]["blocks"][0]["mixer_norm"]["scale"] *= 3e38
    with jax.set_mesh(mesh):
        told["fault"] = diagnose(config, model, state.params, place(batch), STEPS)
    return {"losses": losses, **told, **found}


def facts(step: jax.stages.Compiled, state) -> dict[str, object]:
    """What the compiled program says of itself.

    in, out: the shape of every array of the state by path, and that of its share on a device.
    collectives: kinds with the shapes of their results on a device.
    arrays: all shapes of more than two dimensions whose last one is (a share of) the vocabulary.
    donated: whether the state that goes out takes the place of that which goes in.
    temporary: bytes that a device needs besides.
    """

    def shares(shardings) -> dict[str, list]:
        leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True)
        return {path_name(path): [x.shape, sharding.shard_shape(x.shape)] for (path, x), sharding in leaves}

    collectives, arrays = set(), set()
    for line in step.as_text().splitlines():
        result = line.partition(" = ")[2]
        kind = next((kind for kind in KINDS if f" {kind}(" in result or f" {kind}-start(" in result), None)
        operands = result.find(f" {kind}") if kind else result.find("{")
        for dims in SHAPE.findall(result[:operands]):
            shape = tuple(int(n) for n in dims.split(",") if n)
            if kind:
                collectives.add((kind, shape))
            if len(shape) > 2 and shape[-1] > WIDTH and VOCABULARY % shape[-1] == 0:
                arrays.add(shape)
    memory = step.memory_analysis()
    into, out = step.input_shardings[0][0], step.output_shardings[0]
    bytes_held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return {
        "in": shares(into),
        "out": shares(out),
        "collectives": sorted(collectives),
        "arrays": sorted(arrays),
        "donated": memory.alias_size_in_bytes >= bytes_held,
        "temporary": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    changes = json.loads(sys.argv[1])
    if outside := changes.pop("import", None):
        importlib.import_module(outside)
    print(json.dumps({axes: train(changes, axes) for axes in sys.argv[2:]}))
