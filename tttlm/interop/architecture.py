"""Architectures of checkpoints: their configuration, and their table of parameter names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tttlm.errors import InputError
from tttlm.model import ModelConfig

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One parameter: its name in the checkpoint, its path in our model, and the conversions between both layouts.

    `{i}` in `name` stands for the block; such a parameter is stacked over the blocks. `path` is a path of attributes,
    relative to a block for those.
    """

    name: str
    path: str
    load: Transform = lambda a: a
    save: Transform = lambda a: a


def transposed(name: str, path: str) -> Entry:
    """A matrix that PyTorch keeps as `[out, in]` and we as `[in, out]`."""
    return Entry(name, path, np.transpose, np.transpose)


def depthwise(name: str, path: str) -> Entry:
    """The kernel of a depthwise convolution, `[C, 1, W]` there and `[W, C]` here."""
    return Entry(name, path, lambda a: a[:, 0].T, lambda a: a.T[:, None])


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints, in one layout.

    Attributes:
        name: Its name in `ARCHITECTURES`; in the Hugging Face layout the `model_type`.
        config: A function from the values of the configuration file to our configuration.
        values: The inverse function; raises InputError if this family has no such model.
        table: All parameters.
        holds: Whether models of this configuration are of this family.
        layout: The storage layout of such a checkpoint; a key of `LAYOUTS`.
    """

    name: str
    config: Callable[[dict[str, Any]], ModelConfig]
    values: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], list[Entry]]
    holds: Callable[[ModelConfig], bool]
    layout: str = "huggingface"


LAYOUTS = {
    "huggingface": "config.json",
    "mamba_ssm": "config.json",
    "official_jax": "model_config.json",
}
"""The layouts of checkpoints, each with the name of its configuration file."""


def only(config: ModelConfig, *mixers: str) -> bool:
    """Whether all blocks of a model have the same mixer, one of these."""
    return len(set(config.mixers)) == 1 and config.mixers[0] in mixers


def integer(values: dict[str, Any], name: str, default: int | None = None) -> int:
    """A size that config.json gives, at least 1; one without a default must be there.

    Raises:
        InputError: it is missing, or no such number.
    """
    value = default if values.get(name) is None else values[name]
    if value is None:
        raise InputError(f"config.json has no {name!r}, which a {values.get('model_type')!r} model needs")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {name} must be a whole number of at least 1, got {value!r}")
    return value


def number(values: dict[str, Any], name: str, default: float) -> float:
    """A positive number that config.json gives."""
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def flag(values: dict[str, Any], name: str, default: bool) -> bool:
    """A yes or no that config.json gives."""
    value = default if values.get(name) is None else values[name]
    if not isinstance(value, bool):
        raise InputError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def expect(values: dict[str, Any], **only: Any) -> None:
    """Refuses unsupported values of config.json; null means the supported value."""
    for name, value in only.items():
        if values.get(name) is not None and values[name] != value:
            raise InputError(f"config.json: {name} must be {value!r}, got {values[name]!r}")


def refuse(values: dict[str, Any], *names: str) -> None:
    """Refuses fields of config.json for features that are not supported."""
    for name in names:
        if values.get(name):
            raise InputError(f"config.json: {name} is not supported, got {values[name]!r}")
