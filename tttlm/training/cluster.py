"""Runs of several processes: how they connect, and what they agree on."""

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tttlm import progress
from tttlm.errors import InputError
from tttlm.training.config import DistributedConfig

T = TypeVar("T")

# Variables by which launchers pass the number of processes.
COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_MESSAGE_BYTES = 1024


def join(config: DistributedConfig) -> None:
    """Connects to the other processes of the run, if there are any; must be called before any other use of JAX.

    JAX itself detects SLURM, Kubernetes, Open MPI and TPU pods; without a cluster this returns at once.

    Raises:
        InputError: the processes cannot connect, or a part of the address is missing.
    """
    given: dict[str, Any] = {
        "coordinator_address": config.coordinator or None,
        "num_processes": config.processes,
        "process_id": config.process,
    }
    explicit = any(value is not None for value in given.values())
    if config.mode == "off" or jax.distributed.is_initialized():
        return
    if config.coordinator and not re.fullmatch(r".+:\d+", config.coordinator):
        raise InputError(f"--distributed.coordinator is HOST:PORT, got {config.coordinator!r}")
    started = next((int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()), None)
    if config.mode == "auto" and not explicit and started == 1:
        return  # a single task of a launcher has all the devices of its machine
    # Open MPI 5 does not pass the address of its first process, mpi4py does.
    mpi = "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ and find_spec("mpi4py")
    method = "mpi4py" if mpi and not explicit else None
    try:
        jax.distributed.initialize(**given, cluster_detection_method=method)
    except ValueError as error:
        alone = started in (None, 1) and "JOB_COMPLETION_INDEX" not in os.environ
        if config.mode == "auto" and not explicit and alone:
            return  # no cluster
        raise InputError(
            f"the processes of this run cannot find each other ({_line(error)}): give --distributed.coordinator "
            "HOST:PORT of process 0, --distributed.processes and --distributed.process (or --distributed.mode off)"
        ) from None
    except Exception as error:
        raise InputError(f"the processes of this run cannot connect: {_line(error)}") from None


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints for all processes."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Prints to standard error, once for all processes."""
    if is_first():
        progress.say(message)


def together(action: Callable[[], T]) -> T:
    """Runs `action` in every process; an `InputError` in one is raised in all, so that none waits for one that exited.

    Raises:
        InputError: the error of the first process that had one.
    """
    if jax.process_count() == 1:
        return action()
    result, message = None, ""
    try:
        result = action()
    except InputError as error:
        message = str(error)
    if first := first_of(message):
        raise InputError(first)
    return result  # type: ignore[return-value]


def first_of(message: str) -> str:
    """The message of the first process that has one, in every process; "" when none has."""
    if jax.process_count() == 1:
        return message
    encoded = message.encode()[:_MESSAGE_BYTES]
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(padded))
    messages = (bytes(row).rstrip(b"\0").decode(errors="ignore") for row in every.reshape(-1, _MESSAGE_BYTES))
    return next((message for message in messages if message), "")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
