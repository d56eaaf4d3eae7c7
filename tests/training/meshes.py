"""Trains a small run on each mesh named on the command line and prints, as JSON, its losses and its compiled program.

A program of its own, because the number of simulated devices is fixed when JAX starts:
`python -m tests.training.meshes '{"model.mixers": ["mamba"]}' MESH...`, a mesh being like `data=2,tensor=4`; changes
of the configuration go by dotted name. Rows hold several documents and padding.
"""

import json
import math
import re
import sys

import jax
import numpy as np

from tests.training.small import small_config
from tttlm.training.config import MeshConfig, TrainConfig
from tttlm.training.sharding import make_mesh, path_name, place_batch
from tttlm.training.step import Model, make_init, make_step

STEPS, ROWS, LENGTH = 20, 8, 32
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, 20, (ROWS, LENGTH + 1)).cumsum(axis=1).astype(np.int32) % 300
        segments = (1 + (rng.random((ROWS, LENGTH)) < 0.1).cumsum(axis=1)).astype(np.int32)
        segments[:2, -5:] = 0
        weights = (segments > 0).astype(np.float32)
        yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "weights": weights}


def parse_mesh(axes: str) -> MeshConfig:
    return MeshConfig(
        **{"fsdp": 1, **{name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}}
    )


def train(changes: dict, axes: str) -> dict[str, object]:
    sizes = parse_mesh(axes)
    config = small_config(
        mesh=sizes,
        steps=STEPS,
        batch_size=ROWS,
        sequence_length=LENGTH,
        **{
            "loss_chunk": 4,
            "model.width": 64,
            "model.heads": 8,
            "model.feed_forward": 32,
            "model.ttt.mini_batch_size": 4,
            "model.mamba2.head_width": 16,
            "model.mamba2.state_width": 8,
            "model.attention.window": 7,
            "model.remat": "block",
            **changes,
        },
    )
    count = math.prod((sizes.data, sizes.fsdp, sizes.tensor, sizes.context))
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    model = Model(config.model)
    state = make_init(config, model, mesh)()
    step, place = make_step(config, model, mesh), place_batch(mesh)
    compiled = step.lower(state, place(next(batches()))).compile()
    losses = []
    for batch in batches():
        state, numbers = step(state, place(batch))
        losses.append(float(numbers["loss"]))
    return {"losses": losses, **facts(config, compiled, state)}


def facts(config: TrainConfig, compiled: jax.stages.Compiled, state) -> dict[str, object]:
    """What the compiled program says of itself.

    shards: for every array of the state that goes in and out, by path, (elements of the whole, elements on a device).
    collectives: [operation, elements of its largest result on a device], each once.
    logits: elements of the largest float32 array whose last dimension is the (share of the) vocabulary.
    """

    def shards(shardings) -> dict[str, list[int]]:
        leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True)
        return {path_name(path): [x.size, math.prod(sharding.shard_shape(x.shape))] for (path, x), sharding in leaves}

    collectives, largest = set(), 0
    vocabulary = {config.model.vocab_size, config.model.vocab_size // config.mesh.tensor}
    for line in compiled.as_text().splitlines():
        rest = line.partition(" = ")[2]
        result = rest[: rest.find(")") if rest.startswith("(") else rest.find(" ")]
        arrays = [(kind, [int(n) for n in dims.split(",") if n]) for kind, dims in SHAPE.findall(result)]
        operation = next((c for c in COLLECTIVES if f" {c}(" in rest or f" {c}-start(" in rest), None)
        if operation:
            collectives.add((operation, max(math.prod(dims) for _, dims in arrays)))
        for kind, dims in arrays:
            if kind == "f32" and dims and dims[-1] in vocabulary:
                largest = max(largest, math.prod(dims))
    return {
        "in": shards(compiled.input_shardings[0][0]),
        "out": shards(compiled.output_shardings[0]),
        "collectives": sorted(collectives),
        "logits": largest,
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps({axes: train(json.loads(sys.argv[1]), axes) for axes in sys.argv[2:]}))
