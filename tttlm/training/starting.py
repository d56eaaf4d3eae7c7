"""Where a new run's parameters come from when they are not random: another run, or a released checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml
from flax import nnx

from tttlm.errors import InputError
from tttlm.interop import from_pretrained
from tttlm.model import ModelConfig
from tttlm.training.checkpoints import load_params, pick_step
from tttlm.training.config import TrainConfig, from_dict
from tttlm.training.run_folder import RunFolder
from tttlm.training.sharding import path_name
from tttlm.training.step import Model


def initial_params(config: TrainConfig, tokenizer: str) -> Callable[[Any], Any]:
    """What `config.init_from` names, checked now and read when the function that comes back is called.

    Args:
        config: names the folder; its model is the one that is trained. Dtypes and what has no parameters, the RoPE base
            for instance, may differ from the model there.
        tokenizer: the fingerprint of the tokenizer that the run's data was made with.

    Returns:
        a function from the abstract parameters, with the dtypes and shardings they are to have, to the parameters.

    Raises:
        InputError: there is no such folder, or its model or tokenizer is another.
    """
    source = Path(config.init_from)
    step = None
    if source.name.isdigit() and source.parent.name == "checkpoints":
        source, step = source.parents[1], int(source.name)
    folder = RunFolder(source)
    if folder.config.is_file():
        return _of_run(config, folder, step, tokenizer)
    if (source / "config.json").is_file():
        return _of_release(config, source)
    raise InputError(
        f"init_from = {config.init_from} is neither the folder of a run (with config.yaml), nor RUN/checkpoints/STEP, "
        "nor a released checkpoint (with config.json)"
    )


def _of_run(config: TrainConfig, folder: RunFolder, step: int | None, tokenizer: str) -> Callable[[Any], Any]:
    try:
        values = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        there = from_dict(ModelConfig, values["model"])
        facts = json.loads(folder.facts.read_text(encoding="utf-8"))
    except (OSError, InputError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(f"init_from = {folder.path} cannot be used: {error}".splitlines()[0]) from None
    if facts.get("tokenizer") != tokenizer:
        raise InputError(
            f"init_from = {folder.path} was trained with another tokenizer than this data was made with, so "
            "its embeddings mean other pieces: prepare the data with that run's tokenizer (data.prepare.tokenizer)"
        )
    _check_shapes(config, Model(there).shapes)
    pick_step(folder.checkpoints, step)
    return lambda abstract: load_params(folder.checkpoints, abstract, step)[1]


def _of_release(config: TrainConfig, source: Path) -> Callable[[Any], Any]:
    params = nnx.to_pure_dict(nnx.state(from_pretrained(source, param_dtype=config.model.param_dtype), nnx.Param))
    _check_shapes(config, params)

    def place(abstract: Any) -> Any:
        return jax.tree.map(
            lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index]),
            params,
            abstract,
        )

    return place


def _check_shapes(config: TrainConfig, there: Any) -> None:
    """Refuses a model whose parameters are not those of `config.model`."""
    shapes = [
        {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(params)}
        for params in (there, Model(config.model).shapes)
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        came, wanted = (known.get(name, "missing") for known in shapes)
        if came != wanted:
            raise InputError(
                f"init_from = {config.init_from} holds another model than `model` describes: parameter {name} is "
                f"{came} there and {wanted} here"
            )
