"""Generates and scores on one device and on a mesh of eight, and prints what came out as JSON.

A program of its own, because the number of simulated devices is fixed when JAX starts:
`python -m tests.inference.meshes MIXER MESH`, a mesh being like `fsdp=2,tensor=2,context=2`.
"""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from tests.inference.small import SMALL, ids
from tttlm.evaluation.loading import on_mesh, sharded
from tttlm.inference import generate, stream_losses
from tttlm.model import LanguageModel
from tttlm.training.config import MeshConfig


def outcome(model: LanguageModel) -> dict[str, list]:
    prompts = [ids(n, n).tolist() for n in (21, 3, 40)]  # three sequences, which no axis divides
    written = generate(model, prompts, max_tokens=6, temperature=0.0, chunk=16)
    documents = [[ids(n, n)] for n in (40, 17, 33)]
    nats = np.zeros(3)
    for losses in stream_losses(model, documents, batch_size=2, chunk=16):
        np.add.at(nats, losses.document, losses.nats)
    return {"tokens": [one.tokens for one in written], "nats": nats.tolist()}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    mixer, axes = sys.argv[1:]
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}
    config = replace(SMALL, mixers=(mixer,), hidden_size=32, num_heads=4, vocab_size=56)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x * 4, nnx.state(model, nnx.Param)))
    alone = outcome(model)
    with on_mesh(MeshConfig(**{"fsdp": 1, **sizes})) as mesh:
        placed = sharded(model, mesh)
        shards = [a.sharding.shard_shape(a.shape) != a.shape for a in jax.tree.leaves(nnx.state(placed)) if a.ndim > 1]
        print(json.dumps({"alone": alone, "mesh": outcome(placed), "sharded": sum(shards)}))
