"""Whether a run fits devices that this machine does not have: compiles its training step for them."""

import re
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from tttlm.data import Batch
from tttlm.model import parameter_count
from tttlm.ops.target import traced_for
from tttlm.planning.collectives import Collective, collectives
from tttlm.planning.topologies import assumed_cudnn, topology_devices
from tttlm.training.config import TrainConfig, check
from tttlm.training.devices import GIB, Device
from tttlm.training.sharding import batch_sharding, check_mesh, make_mesh
from tttlm.training.step import Model, abstract_state, make_train_step

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """The result of compiling the step for a topology.

    Attributes:
        topology, devices: the topology, and its number of devices.
        mesh: the size of each axis.
        parameters: number of parameters of the model.
        flops_per_token: FLOPs per token of a training step, three times the forward pass by the model's own formula.
        tokens_per_step: tokens of a batch, over all devices.
        memory: memory of a device in bytes.
        peak: peak memory of the step in bytes; if the step does not fit and the compiler failed, the memory that it had
            requested at that point.
        state: bytes on a device between steps: its shard of parameters and optimiser state. None if the compiler
            failed.
        collectives: collectives of one step; None if the compiler failed.
        loops_known: whether the trip count of every loop around a collective is known.
        seconds: time of tracing and compiling.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    flops_per_token: float
    tokens_per_step: int
    memory: int
    peak: int
    state: int | None
    collectives: list[Collective] | None
    loops_known: bool
    seconds: float

    @property
    def fits(self) -> bool:
        return self.state is not None and self.peak <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return asdict(self) | {"fits": self.fits}


def make_plan(config: TrainConfig, topology: str) -> Plan:
    """Compiles the training step of `config` for a topology such as "v5e:4x8". Neither data nor the run is used.

    Raises:
        InputError: the configuration, the mesh or the topology cannot be used.
    """
    check(config)
    device, devices = topology_devices(topology)
    mesh = make_mesh(config.mesh, devices)
    check_mesh(mesh, config)
    print(f"compiling for {topology}: this takes a minute or two", file=sys.stderr)
    return compiled_plan(config, mesh, topology, device)


def compiled_plan(config: TrainConfig, mesh: Mesh, topology: str, device: Device) -> Plan:
    """The plan for a mesh of devices of one kind."""
    started = time.monotonic()
    model = Model(config.model)
    step: Any = make_train_step(config, model, mesh)
    state, collected, known = None, None, True
    with traced_for(mesh.devices.flat[0]):  # mixers choose chunk sizes by the target device
        flops = 3 * config.model.flops_per_token(config.sequence_length)
    try:
        with assumed_cudnn():
            lowered = step.lower(abstract_state(config, model, mesh), _batch(config, mesh))
        compiled = lowered.compile()
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak, memory = _needed_and_available(str(error), device)
    else:
        sizes: Any = compiled.memory_analysis()
        peak, memory, state = sizes.peak_memory_in_bytes, device.memory, sizes.argument_size_in_bytes
        collected, known = collectives(compiled.as_text())
    return Plan(
        topology=topology,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        parameters=parameter_count(config.model),
        flops_per_token=flops,
        tokens_per_step=config.batch_size * config.sequence_length,
        memory=memory,
        peak=peak,
        state=state,
        collectives=collected,
        loops_known=known,
        seconds=time.monotonic() - started,
    )


def _batch(config: TrainConfig, mesh: Mesh) -> Batch[jax.ShapeDtypeStruct]:
    """The abstract arrays of a batch of the configured layout."""
    shape, sharding = (config.batch_size, config.sequence_length), batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    if config.data.layout == "windows":
        return Batch(ids, ids)
    batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))
    if config.data.layout != "documents":
        return batch
    per_example = jax.NamedSharding(mesh, jax.P(sharding.spec[0]))
    return batch._replace(continues=jax.ShapeDtypeStruct(shape[:1], jnp.bool_, sharding=per_example))


def _needed_and_available(message: str, device: Device) -> tuple[int, int]:
    """(bytes needed, bytes available) from a compiler error such as "(27.45G) exceeds available HBM (15.75G)"."""
    sizes = [int(float(number) * UNITS[unit]) for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)]
    return (sizes[0], sizes[1]) if len(sizes) > 1 else (device.memory + 1, device.memory)


def describe(plan: Plan) -> list[str]:
    """The plan as lines to print; the last one is the verdict."""
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{'topology':20}{plan.topology}: {plan.devices} devices, as {axes}",
        f"{'parameters':20}{plan.parameters:,}",
        f"{'tokens a step':20}{plan.tokens_per_step:,}",
        f"{'FLOPs a token':20}{plan.flops_per_token / 1e9:.2f} billion, forward and backward, by the model's formula",
        f"{'compiled in':20}{plan.seconds:.0f} s",
    ]
    if plan.state is not None and plan.collectives is not None:
        lines += [f"{'state':20}{plan.state / GIB:.2f} GiB a device: parameters and optimiser state, between steps"]
        lines += [f"{'peak memory':20}{plan.peak / GIB:.2f} GiB a device, of {plan.memory / GIB:.2f} GiB"]
        often = "in one step" if plan.loops_known else "in one step, with loops of unknown length counted once"
        lines += [f"collectives {often}, and the bytes that a device sends or receives:"]
        lines += [f"  {one.kind:18}{one.count:10,}  {one.bytes / GIB:10.3f} GiB" for one in plan.collectives]
        if not plan.collectives:
            lines += ["  none"]
    verdict = f"{plan.peak / GIB:.2f} GiB of the {plan.memory / GIB:.2f} GiB that a device has"
    if plan.fits:
        lines += [f"fits: the step needs {verdict}"]
    else:
        at_least = "" if plan.state is not None else "at least "
        lines += [f"does not fit: the step needs {at_least}{verdict}"]
    return lines
