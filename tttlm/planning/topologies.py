"""Descriptions of devices to compile for: v5e:4x8 is a slice of 32 TPUs, h200:8 a host of 8 GPUs."""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax.errors import JaxRuntimeError

from tttlm.errors import InputError
from tttlm.planning.gpu_target import CUDNN, GPUS, target_config
from tttlm.training.devices import DEVICES, Device

TPUS = ("v5e", "v5p", "v6e")
GPUS_OF_A_HOST = 8
# Values that libtpu would otherwise request from a metadata server; describing a topology does not need them.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans may run at the same time
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
INSTALL = "in an environment of its own, `pip install 'tttlm[plan]'` installs it"


def topology_devices(name: str) -> tuple[Device, list[Any]]:
    """The kind of device of a topology, and its JAX devices.

    Raises:
        InputError: the topology is unknown, or the compiler for it is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in (*TPUS, *GPUS):
        raise InputError(f"--plan {name}: the device is one of {', '.join((*TPUS, *GPUS))}, as in v5e:4x8 and h200:8")
    device = next(device for device in DEVICES if device.name == kind)
    return device, _tpus(name, shape) if kind in TPUS else _gpus(name, device, shape)


def _tpus(name: str, shape: str) -> list[Any]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise InputError(f"--plan {name}: a slice of TPUs is named by its shape, as in v5e:4x8 and v5p:2x2x4")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--plan {name}: compiling for TPUs needs the package libtpu; {INSTALL}")
    for variable, value in NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    alone = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    return _described(name, "tpu", name, **alone)


def _gpus(name: str, device: Device, shape: str) -> list[Any]:
    count = int(shape) if re.fullmatch(r"[1-9]\d*", shape) else 0
    if not count or (count > GPUS_OF_A_HOST and count % GPUS_OF_A_HOST):
        raise InputError(f"--plan {name}: give the number of GPUs, as in h200:8; above 8 they fill hosts of 8")
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise InputError(f"--plan {name}: compiling for GPUs needs the package jax-cuda12-plugin; {INSTALL}")
    hosts, each = max(1, count // GPUS_OF_A_HOST), min(count, GPUS_OF_A_HOST)
    return _described(name, "cuda", device.name, topology=f"1x{hosts}x{each}", target_config=target_config(device))


def _described(name: str, platform: str, topology_name: str, **options: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology_name, platform, **options).devices)
    except (JaxRuntimeError, RuntimeError) as error:
        raise InputError(f"--plan {name}: {str(error).splitlines()[0]}") from None


@contextmanager
def assumed_cudnn() -> Iterator[None]:
    """Makes JAX's checks for cuDNN attention use the target's GPU and cuDNN instead of those of this machine."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    major, minor, patch = CUDNN
    with mock.patch.multiple(
        fused,
        check_cudnn_version=lambda: 10_000 * major + 100 * minor + patch,
        check_compute_capability=lambda capability: float(capability) <= 9.0,
        is_cuda_compute_capability_equal=lambda capability: float(capability) == 9.0,
    ):
        yield


def only_compile() -> None:
    """Configures a process that only compiles, before JAX has started: it does not use the machine's accelerators, nor
    the compilation cache, so that the measured time of compilation is correct."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
