"""Computes the loss of a model of learners and its gradients in float64 on one device and on each mesh named on the
command line, and prints, as JSON, how far they differ and over how many devices a matrix is stored at least.

A program of its own, because the number of simulated devices is fixed when JAX starts:
`python -m tests.mixers.learner_meshes '["titans"]' MESH...`, a mesh being like `data=2,tensor=2`.
Rows hold several documents that start anywhere, and padding.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tttlm.model import ModelConfig
from tttlm.training.config import MeshConfig
from tttlm.training.sharding import batch_sharding, check_model_mesh, make_mesh, tree_shardings
from tttlm.training.step import Model

CHUNKED = {"chunk_size": 4}
LARGE = {**CHUNKED, "inner_learning_rate": 1.0}  # so that what is learned shows
OPTIONS = {
    "titans": {**LARGE, "inner_size": 6},
    "titans_gate": {**LARGE, "sliding_window": 5},
    "titans_context": LARGE,
    "lact": CHUNKED,
    "tnt": {**LARGE, "local_chunk_size": 2, "local_shard_size": 4},
    "atlas": {**LARGE, "window": 3},
    "inplace_ttt": LARGE,
    "longhorn": {"head_dim": 4, "rate_rank": 4},
    "gla": {"gate_rank": 4},
}
# The last are long enough for momentum to be read: it needs two chunks before.
SEGMENTS = np.array([[0, 1, 1, 1, 1, 0, 2, 2, 2, 3, 3, 3], [5] * 7 + [6] * 5, [7] * 12, [8] * 12] * 2)


def config_of(mixers: list[str]) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        hidden_size=16,
        num_layers=len(mixers),
        num_heads=2,
        intermediate_size=0 if "inplace_ttt" in mixers else 8,
        mixers=tuple(mixers),
        mixer_options={name: OPTIONS[name] for name in mixers if name in OPTIONS},
        initializer_range=0.3,
        dtype="float64",
        param_dtype="float64",
        remat="none",
    )


def gradients(config: ModelConfig, mesh) -> tuple[object, list[float]]:
    """The loss and its gradients, and by how many devices every stored matrix is divided."""
    model = Model(config)
    params = jax.tree.map(lambda a: a + 0.05 * np.random.default_rng(1).normal(size=a.shape), model.init(0))
    tokens = np.random.default_rng(0).integers(40, size=SEGMENTS.shape)
    weights = SEGMENTS > 0

    def loss(params, tokens, segments, weights):
        log_probabilities = jax.nn.log_softmax(model.bind(params)(tokens, segments))
        return -jnp.sum(weights[..., None] * log_probabilities * jax.nn.one_hot(tokens, 40)) / jnp.sum(weights)

    check_model_mesh(mesh, config)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(config, params, mesh))
        batch = [jax.device_put(a, batch_sharding(mesh)) for a in (tokens, SEGMENTS, weights)]
        found = jax.jit(jax.value_and_grad(loss))(params, *batch)
    matrices = [a for a in jax.tree.leaves(params["stack"]) if a.ndim > 2]  # with the axis of stacked blocks
    return jax.device_get(found), [a.size / math.prod(a.sharding.shard_shape(a.shape)) for a in matrices]


def main(mixers: list[str], meshes: list[str]) -> dict[str, dict[str, float]]:
    config = config_of(mixers)

    def on(axes: str):
        sizes = {"fsdp": 1, **{name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))}}
        return gradients(config, make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())]))

    expected, _ = on("data=1")
    smallest = min(float(np.max(np.abs(a))) for a in jax.tree.leaves(expected))
    told = {"one device": {"smallest": smallest}}
    for axes in meshes:
        found, divided = on(axes)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        far = max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)
        told[axes] = {"difference": far, "divided": min(divided)}
    return told


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_enable_x64", True)
    print(json.dumps(main(json.loads(sys.argv[1]), sys.argv[2:])))
