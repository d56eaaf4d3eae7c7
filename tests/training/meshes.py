"""Trains a small run on each mesh named on the command line and prints losses and shardings as JSON.

A program of its own, because the number of simulated devices is fixed when JAX starts:
`python -m tests.training.meshes MIXER MESH...`, a mesh being like `data=2,tensor=4`.
"""

import json
import sys

import jax
import numpy as np

from tests.training.small import small_config
from tttlm.training.config import MeshConfig
from tttlm.training.sharding import make_mesh, path_name, place_batch
from tttlm.training.step import Model, init_state, make_step, tree_shardings

STEPS = 20


def train(mixer: str, axes: str) -> dict[str, object]:
    sizes = {"fsdp": 1, **{name: int(size) for name, _, size in (axis.partition("=") for axis in axes.split(","))}}
    config = small_config(
        mesh=MeshConfig(**sizes),
        steps=STEPS,
        batch_size=8,
        **{"model.mixers": (mixer,), "model.width": 32, "model.heads": 4, "model.feed_forward": 32},
    )
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(list(sizes.values())))])
    model = Model(config.model)
    start = init_state(config, model)
    state = jax.device_put(start, tree_shardings(start, mesh))
    step, place = make_step(config, model, mesh), place_batch(mesh)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(STEPS):
        tokens = rng.integers(0, 20, (8, 33)).cumsum(axis=1).astype(np.int32) % 300
        state, numbers = step(state, place({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}))
        losses.append(float(numbers["loss"]))
    whole = [
        path_name(path)
        for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.moments))
        if x.sharding.is_fully_replicated and x.ndim > 1
    ]
    return {"losses": losses, "replicated": whole}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps({axes: train(sys.argv[1], axes) for axes in sys.argv[2:]}))
