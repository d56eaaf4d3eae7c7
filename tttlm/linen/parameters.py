"""Conversion of parameters between an NNX layer and the same Linen module: nested dictionaries with the same names."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tttlm.errors import InputError


def to_linen(layer: nnx.Module) -> dict[str, Any]:
    """Returns the parameters of an NNX layer as those of the same Linen module, `{"q_proj": {"kernel": ...}, ...}`."""
    flat = {tuple(map(str, path)): p[...] for path, p in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    return unflatten_dict(flat)


def to_nnx(layer: nnx.Module, params: Mapping[str, Any]) -> None:
    """Sets the parameters of an NNX layer to those of the same Linen module, in place.

    Raises:
        InputError: A parameter is missing, unknown, or has another shape.
    """
    given = flatten_dict(dict(params))
    state = nnx.state(layer, nnx.Param)
    for path, parameter in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        value = given.pop(tuple(map(str, path)), None)
        shape = None if value is None else value.shape
        if shape != parameter.shape:
            raise InputError(f"parameter {name} must have shape {parameter.shape}, got {shape}")
        parameter.set_value(value)
    if given:
        raise InputError(f"the layer has no parameter {'/'.join(next(iter(given)))}: give those of the same layer")
    nnx.update(layer, state)


def filled(layer: nnx.Module, params: Mapping[str, Any]) -> nnx.Module:
    """Returns `layer`, which may be abstract, with these parameters."""
    graph, state = nnx.split(layer)
    given = flatten_dict(dict(params))
    values = {path: p.replace(given[tuple(map(str, path))]) for path, p in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(values))
