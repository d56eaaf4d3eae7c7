"""Initial parameters from another run or a released checkpoint."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.fields import field_values, with_fields
from tttlm.interop import from_pretrained, is_pretrained
from tttlm.model import ModelConfig
from tttlm.training.checkpoint_files import load_params, pick_step
from tttlm.training.config import TrainConfig, identity
from tttlm.training.run_folder import RunFolder
from tttlm.training.sharding import path_name
from tttlm.training.step import Model

# Fields of the model that change how it is computed, stored or initialised, and not its outputs.
SAME_FUNCTION = re.compile(
    r"dtype|param_dtype|remat|initializer_range|conv_init|.*\.(remat_mini_batches|max_length|implementation|chunk_size)"
)
_LENGTH = 4096  # tokens for which two models are compared: longer than usual sliding windows


def initial_params(config: TrainConfig, tokenizer: str) -> Callable[[Any], Any]:
    """Checks the source that `config.init_from` names, and returns a function that reads its parameters.

    Args:
        config: the configuration of the new run. Dtypes, and the fields in `config.init_from_changes`, may differ from
            the model of the source.
        tokenizer: the fingerprint of the tokenizer that the run's data was made with.

    Returns:
        A function from abstract parameters, with dtypes and shardings, to the parameters.

    Raises:
        InputError: the source does not exist, or has another model or tokenizer.
    """
    source = Path(config.init_from)
    step = None
    if re.fullmatch("[0-9]{1,18}", source.name) and source.parent.name == "checkpoints":
        source, step = source.parents[1], int(source.name)
    folder = RunFolder(source)
    if folder.config.is_file():
        return _of_run(config, folder, step, tokenizer)
    if is_pretrained(source):
        return _of_release(config, source)
    raise InputError(
        f"init_from = {config.init_from} is neither a run directory (with config.yaml), nor RUN/checkpoints/STEP, "
        "nor a released checkpoint (with config.json, or a stream and model_config.json)"
    )


def _of_run(config: TrainConfig, folder: RunFolder, step: int | None, tokenizer: str) -> Callable[[Any], Any]:
    try:
        source = folder.read_config()
        there = source.model
        trained = folder.read_facts().tokenizer
    except InputError as error:
        raise InputError(f"init_from = {folder.path} cannot be used: {error}") from None
    if trained != tokenizer:
        raise InputError(
            f"init_from = {folder.path} was trained with another tokenizer than this data was made with, so "
            "its embeddings are of other pieces: prepare the data with that run's tokenizer (data.prepare.tokenizer)"
        )
    _check_shapes(config, Model(there).shapes)
    _check_function(config, there)
    pick_step(folder.checkpoints, step)
    return lambda abstract: load_params(folder.checkpoints, abstract, step, run=identity(source))[1]


def _of_release(config: TrainConfig, source: Path) -> Callable[[Any], Any]:
    model = from_pretrained(source, param_dtype=config.model.param_dtype)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _check_shapes(config, params)
    _check_function(config, model.config)

    def place(abstract: Any) -> Any:
        return jax.tree.map(
            lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index]),
            params,
            abstract,
        )

    return place


def _check_shapes(config: TrainConfig, there: Any) -> None:
    """Refuses a source whose parameters do not have the names and shapes of `config.model`."""
    shapes = [
        {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)}
        for params in (there, Model(config.model).shapes)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        came, wanted = (named.get(name, "missing") for named in shapes)
        if came != wanted:
            raise InputError(
                f"init_from = {config.init_from} has another model than `model` describes: parameter {name} is "
                f"{came} there and {wanted} here"
            )


def _check_function(config: TrainConfig, there: ModelConfig) -> None:
    """Refuses a model that computes different outputs from the same parameters: other heads, another RoPE base, ..."""
    here = {name: value for name, _, value in field_values(config.model)}
    other = {name: value for name, _, value in field_values(there)}
    if unknown := [name for name in config.init_from_changes if name.removeprefix("model.") not in here]:
        raise InputError(f"init_from_changes names fields of the model, such as rope_theta, got {unknown[0]!r}")
    allowed = {name.removeprefix("model.") for name in config.init_from_changes}
    differing = [name for name in here if here[name] != other[name] and not SAME_FUNCTION.fullmatch(name)]
    if not differing:
        return
    taken = {name: here[name] for name in here if name in allowed or SAME_FUNCTION.fullmatch(name)}
    length = math.lcm(config.align, TrainConfig(model=there).align)
    length *= -(-max(_LENGTH, 2 * config.sequence_length) // length)
    if _computation(with_fields(there, taken), length) != _computation(config.model, length):
        changes = [f"{name}: {other[name]} there, {here[name]} here" for name in differing if name not in allowed]
        raise InputError(
            f"init_from = {config.init_from} has parameters of this shape, but its model computes something else "
            f"with them ({'; '.join(changes)}): make `model` the same, or name in init_from_changes what may differ"
        )


def _computation(config: ModelConfig, length: int) -> tuple[str, list[bytes]]:
    """The computation of a model as text and constants; equal for models that compute the same."""
    model = Model(config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    traced = jax.make_jaxpr(lambda params, tokens: model.bind(params)(tokens))(model.shapes, tokens)
    text = re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr))
    return text, [np.asarray(constant).tobytes() for constant in traced.consts]
