"""A checkpoint in a folder: which model it is, its parameters one by one, and how one is written."""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from tttlm.errors import InputError
from tttlm.interop import fla, llama, mamba, mamba2, official_jax, ttt
from tttlm.interop.architecture import LAYOUTS, Architecture, Entry
from tttlm.interop.tensors import INDEX, SINGLE, Tensors, Written, read_json, safetensors, write_safetensors
from tttlm.model import LanguageModel, ModelConfig
from tttlm.ops.rope import rope_frequencies

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        *(llama.LLAMA, llama.QWEN2, llama.QWEN3),
        *(mamba.MAMBA, mamba.MAMBA_SSM, mamba2.MAMBA2, mamba2.MAMBA2_SSM),
        *(ttt.TTT, official_jax.OFFICIAL_JAX),
        *(fla.DELTANET, fla.GATED_DELTANET, fla.KDA, fla.GLA),
    )
}
# Constants that some versions of the reference code store beside the parameters, and what they are.
CONSTANTS: dict[str, Callable[[ModelConfig, int], np.ndarray]] = {
    "*.inv_freq": lambda config, size: rope_frequencies(2 * size, config.rope_theta, config.attention.rope_scaling),
    "*.token_idx": lambda config, size: 1 / np.arange(1, size + 1),
}

Place = tuple[Any, ...]


class Part(NamedTuple):
    """One parameter of a model, or what one repeat of the pattern has of a stacked one.

    Attributes:
        path: The path of the parameter in the model.
        repeat: The index into its stack; None where it is not stacked.
        entry: What is known of it in a checkpoint.
        name: Its name there.
    """

    path: Place
    repeat: int | None
    entry: Entry
    name: str


def parts(architecture: Architecture, config: ModelConfig) -> Iterator[Part]:
    """All parameters of a model, those of a stack one after another."""
    period = len(config.mixers)
    for entry in architecture.table(config):
        path = tuple(int(part) if part.isdigit() else part for part in entry.path.split("."))
        if "{i}" not in entry.name:
            yield Part(path, None, entry, entry.name)
            continue
        for p in range(period):
            for repeat in range(config.repeats):
                name = entry.name.format(i=repeat * period + p)
                yield Part(("stack", "blocks", p, *path), repeat, entry, name)


def abstract_parameters(config: ModelConfig) -> tuple[Any, dict[Place, Any]]:
    """The structure of a model, and its parameters without values, by path."""
    graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    return graph, dict(nnx.to_flat_state(state))


class Checkpoint:
    """A checkpoint in a folder, opened.

    Attributes:
        folder: The folder.
        architecture: Its family and layout.
        values: What its configuration file says.
        config: Our configuration of it.
        tensors: Its tensors.

    Raises:
        InputError: in one line, for an unknown architecture or a file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_run(folder)
        official = not (folder / "config.json").exists() and bool(official_jax.streams(folder))
        file = folder / (official_jax.CONFIG if official else "config.json")
        self.values = _values(file)
        self.architecture = official_jax.OFFICIAL_JAX if official else _architecture(self.values, file)
        try:
            self.config = self.architecture.config(self.values)
        except InputError as error:
            raise InputError(f"{folder}: {re.sub('^config.json', file.name, str(error))}") from None
        except (ArithmeticError, ValueError) as error:  # for instance a ratio that makes a size infinite
            raise InputError(f"{folder}: {file.name} has sizes that no model can have ({error})") from None
        self.tensors: Tensors = official_jax.read_parameters(folder) if official else safetensors(folder)
        if self.config.num_layers > len(self.tensors):
            raise InputError(
                f"{folder}: {file.name} says num_hidden_layers = {self.config.num_layers}, but the folder holds "
                f"{len(self.tensors)} tensors in all; check {file.name} against the file"
            )
        _, parameters = abstract_parameters(self.config)
        self._shapes = {path: variable.shape for path, variable in parameters.items()}
        self.parts = list(parts(self.architecture, self.config))
        if missing := self._shapes.keys() - {part.path for part in self.parts}:
            raise AssertionError(f"the table of {self.architecture.name} has no entry for {sorted(map(str, missing))}")

    def read(self, part: Part) -> np.ndarray:
        """The values of a part in our layout, in the dtype of the file.

        Raises:
            InputError: names the tensor that is missing, of another shape, or cannot be read.
        """
        return part.entry.load(self.tensors.read(self.stored_name(part), shape_there(part, self._shapes[part.path])))

    def stored_name(self, part: Part) -> str:
        """The name of the tensor; of tied ones some writers keep the head alone."""
        tied = self.config.tie_embeddings and part.path == ("embed", "embedding")
        return "lm_head.weight" if tied and part.name not in self.tensors and HEAD in self.tensors else part.name

    def check(self) -> None:
        """Refuses a tensor that is missing or of another shape, and one that is neither a parameter nor a copy of one.

        Raises:
            InputError: names the tensor.
        """
        tensors, config = self.tensors, self.config
        for part in self.parts:
            tensors.check(self.stored_name(part), shape_there(part, self._shapes[part.path]))
        for name in sorted(set(tensors) - {self.stored_name(part) for part in self.parts}):
            known = next((of for pattern, of in CONSTANTS.items() if fnmatch.fnmatch(name, pattern)), None)
            if known is not None:
                value = tensors.read_any(name).ravel().astype(np.float64)
                if np.allclose(value, known(config, value.size), rtol=1e-2):  # some are stored in bfloat16
                    continue
                raise InputError(
                    f"{tensors.folder}: tensor {name!r} holds other values than config.json makes (rope_theta = "
                    f"{config.rope_theta}); check config.json against the file"
                )
            if name == HEAD and config.tie_embeddings:  # a copy of the embedding, as some writers keep it
                embedding = self.read(next(part for part in self.parts if part.path == ("embed", "embedding")))
                if np.array_equal(tensors.read(name, embedding.shape), embedding):
                    continue
                raise InputError(
                    f"{tensors.folder}: tensor {name!r} is not the embedding, but config.json ties the two "
                    "(tie_word_embeddings, also where it is left out); set it to false if the head is one of its own"
                )
            raise InputError(
                f"{tensors.folder}: tensor {name!r} is no part of the model that {tensors.source} describes; "
                f"check {tensors.source} against the file"
            )


HEAD = "lm_head.weight"


def is_pretrained(folder: str | Path) -> bool:
    """Whether a folder holds a released model: a `config.json`, or a stream of the official JAX trainer."""
    folder = Path(folder)
    return (folder / "config.json").is_file() or bool(official_jax.streams(folder))


def refuse_run(folder: Path) -> None:
    """Refuses the folder of a run, which is read by another call.

    Raises:
        InputError: says which.
    """
    if (folder / "config.yaml").is_file() and not (folder / "config.json").exists():
        raise InputError(
            f"{folder} is the folder of a run: read it with tttlm.evaluation.run.load_run({str(folder)!r}).model, or "
            f"convert it first: python -m tttlm.cli.convert {folder} FOLDER"
        )


def _values(file: Path) -> dict[str, Any]:
    if file.name == official_jax.CONFIG and not file.exists():
        pickled = " (metadata.pkl, which holds it too, is a pickle and never opened)"
        hint = pickled if (file.parent / "metadata.pkl").exists() else ""
        raise InputError(
            f"{file}: is missing{hint}; write the `config` that the trainer was started with there, as JSON"
        )
    return read_json(file)


def _architecture(values: dict[str, Any], file: Path) -> Architecture:
    """Which family and layout a configuration file is of."""
    kind = values.get("model_type")
    if kind is None and ("ssm_cfg" in values or {"d_model", "n_layer"} <= values.keys()):
        ssm = values.get("ssm_cfg") or {}
        layer = ssm.get("layer", "Mamba1") if isinstance(ssm, dict) else ssm
        if layer not in ("Mamba1", "Mamba2"):
            raise InputError(f"{file}: ssm_cfg.layer must be 'Mamba1' or 'Mamba2', got {layer!r}")
        return mamba.MAMBA_SSM if layer == "Mamba1" else mamba2.MAMBA2_SSM
    known = {name: a for name, a in ARCHITECTURES.items() if a.layout == "huggingface"}
    if str(kind) not in known:
        raise InputError(f"{file}: unknown model_type {kind!r}; there are {', '.join(sorted(known))}")
    return known[str(kind)]


def architecture_for(config: ModelConfig, *, like: str = "", layout: str | None = None) -> Architecture:
    """The family and layout that a model is written in.

    Args:
        config: the model.
        like: the architecture that it came in, which is taken where nothing speaks against it.
        layout: a key of `LAYOUTS`; None: that of `like`, or Hugging Face's.

    Raises:
        InputError: no released layout, or not that one, has such a model.
    """
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    fitting = [architecture for architecture in ARCHITECTURES.values() if architecture.holds(config)]
    wanted = layout or (ARCHITECTURES[like].layout if like in ARCHITECTURES else "huggingface")
    for architecture in sorted(fitting, key=lambda a: a.name != like):
        if architecture.layout == wanted or (layout is None and fitting and wanted not in {a.layout for a in fitting}):
            return architecture
    if fitting:
        raise InputError(f"layout {wanted} has no model of mixers {list(config.mixers)}: choose {fitting[0].layout}")
    raise InputError(f"no released layout has a model of mixers {list(config.mixers)}; it stays in its run directory")


def shape_there(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part in a checkpoint, from that of the parameter in our model."""
    shape = shape if part.repeat is None else shape[1:]
    return part.entry.save(np.broadcast_to(np.float32(0), shape)).shape


def write_checkpoint(
    folder: Path,
    architecture: Architecture,
    config: ModelConfig,
    values: dict[str, Any],
    read: Callable[[Part], np.ndarray],
    dtype: Callable[[Part], np.dtype],
    *,
    shard_bytes: int,
    train_state: bool = False,
) -> None:
    """Writes a model tensor by tensor, and its configuration file last.

    Args:
        folder: made when missing; it must not hold a checkpoint yet.
        architecture: the family and layout.
        config: the model.
        values: what the configuration file is to say.
        read: gives the values of a part in our layout.
        dtype: gives the dtype in which they come.
        shard_bytes: how large one file of safetensors may be.
        train_state: whether the official JAX trainer is to find a train state, at step 0, and not parameters alone.

    Raises:
        InputError: the folder holds a checkpoint already, or cannot be written.
    """
    refuse_checkpoint(folder)
    _, parameters = abstract_parameters(config)

    def written(part: Part) -> Written:
        shape = shape_there(part, parameters[part.path].shape)
        return Written(part.name, shape, dtype(part), lambda: np.ascontiguousarray(part.entry.save(read(part))))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = [written(part) for part in parts(architecture, config)]
        if architecture.layout == "official_jax":
            official_jax.write_parameters(folder, tensors, train_state=train_state)
        else:
            write_safetensors(folder, tensors, shard_bytes)
        (folder / LAYOUTS[architecture.layout]).write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}): make room, or choose another folder"
        ) from None


def refuse_checkpoint(folder: Path) -> None:
    """Refuses a folder that holds a checkpoint already."""
    if (folder / SINGLE).exists() or (folder / INDEX).exists() or official_jax.streams(folder):
        raise InputError(f"{folder} holds a checkpoint already; choose another folder or remove it first")


def model_parameters(model: LanguageModel) -> dict[Place, jax.Array]:
    """The values of a model's parameters by path."""
    return {path: value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
