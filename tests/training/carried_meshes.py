"""Trains on documents with carried state on each mesh named on the command line; prints the losses as JSON.

A program of its own, because the number of simulated devices is fixed when JAX starts.
"""

import json
import sys

import jax
import numpy as np

from tests.training.test_carried import config_of, steps_of
from tttlm.training.carried import check_carried
from tttlm.training.config import MeshConfig
from tttlm.training.sharding import check_mesh, make_mesh, place_batch
from tttlm.training.step import Model, make_init, make_train_step

DOCUMENTS = [[50, 5], [17, 16, 20], [40], [30, 30]]


def losses(mixer: str, data: int, fsdp: int) -> list[float]:
    sizes = MeshConfig(data=data, fsdp=fsdp)
    config = config_of(mixer, batch_size=4, mesh=sizes)
    mesh = make_mesh(sizes, jax.devices()[: data * fsdp])
    check_mesh(mesh, config)
    check_carried(config, mesh, 60)
    model = Model(config.model)
    state, step, place = make_init(config, model, mesh)(), make_train_step(config, model, mesh), place_batch(mesh)
    rng = np.random.default_rng(0)
    documents = [[rng.integers(0, 300, length + 1) for length in at_position] for at_position in DOCUMENTS]
    found = []
    for batch in steps_of(documents):
        state, values = step(state, place(batch))
        found.append(float(values["loss"]))
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    mixer, *meshes = sys.argv[1:]
    print(json.dumps([losses(mixer, *map(int, mesh.split("x"))) for mesh in meshes]))
