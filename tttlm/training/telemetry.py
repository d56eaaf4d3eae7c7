"""Measurements inside the layers: a separate compiled function that is run on some batches."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Int

from tttlm.data import Batch
from tttlm.ops.ttt import InnerStatistics
from tttlm.training.config import TrainConfig
from tttlm.training.optimizer import inner_multiplier
from tttlm.training.step import Model

Measured = tuple[InnerStatistics | None, ...]


def make_telemetry(
    config: TrainConfig, model: Model, mesh: Mesh
) -> Callable[[Any, Batch[Array], Int[Array, ""] | int], Measured]:
    """The compiled measurement: (parameters, batch, step) to measurements that `named` names.

    Every TTT layer is measured on the batch, or on one part of it with `accumulate`.
    """

    def measure(params: Any, batch: Batch[Array], step: Int[Array, ""]) -> Measured:
        batch = jax.tree.map(lambda x: x[:: config.accumulate], batch)
        with use_abstract_mesh(mesh.abstract_mesh):
            return model.bind(params).inner_statistics(
                batch.inputs,
                batch.segment_ids,
                inner_learning_rate_multiplier=inner_multiplier(config, step),
            )

    return jax.jit(measure, out_shardings=NamedSharding(mesh, PartitionSpec()))


def named(measured: Measured) -> dict[str, float]:
    """The measurements by their names in the metrics, such as `layer_03/inner_loss_before`."""
    numbers: dict[str, float] = {}
    for index, of_block in enumerate(measured):
        if of_block is None:
            continue
        for repeat in range(len(of_block.loss_before)):
            layer = f"layer_{repeat * len(measured) + index:02d}/"
            one = jax.tree.map(lambda x, repeat=repeat: x[repeat], of_block)
            numbers |= {
                f"{layer}inner_loss_before": float(one.loss_before),
                f"{layer}inner_loss_after": float(one.loss_after),
                f"{layer}inner_learning_rate": float(one.learning_rate),
                f"{layer}inner_weight_norm": float(one.weight_norm),
            }
            quarters = len(one.drift)
            numbers |= {f"{layer}drift_{100 * (q + 1) // quarters}": float(x) for q, x in enumerate(one.drift)}
    return numbers


def device_memory() -> dict[str, float]:
    """Peak memory of the fullest device of this process in GiB, if the device reports it."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    reported = [peak for peak in peaks if peak is not None]
    return {"device_memory": max(reported) / 2**30} if reported else {}
