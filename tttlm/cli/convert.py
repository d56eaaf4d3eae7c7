"""`python -m tttlm.cli.convert FROM TO`: converts a model from one layout to another, tensor by tensor."""

import contextlib
import ctypes
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tttlm.cli.arguments import parse, program, run_command
from tttlm.errors import CannotWrite, InputError
from tttlm.fields import refuse_unused
from tttlm.ranges import CountOrZero, FilePath, Range, Seed

DESCRIPTION = """Converts a model between released layouts and the folders of runs, one tensor at a time.

For example:  python -m tttlm.cli.convert runs/quickstart released/       # a run becomes a Hugging Face folder
              python -m tttlm.cli.convert official/ released/             # from a stream of the official JAX trainer
              python -m tttlm.cli.convert released/ official/ --layout official_jax
              python -m tttlm.cli.convert released/ runs/new --layout run
              python -m tttlm.cli.convert llama/ runs/warm --mixers attention ttt_linear --zero_readout

Prints the name, source, shape and dtype of every tensor, and compares the logits of both for random tokens."""
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_AGREES = 1e-5  # relative to the largest logit


@dataclass(frozen=True)
class ConvertConfig:
    """Configuration of a conversion."""

    folders: tyro.conf.Positional[tuple[FilePath, ...]] = ()
    """The folders FROM and TO. FROM is a run or a released folder; TO is created, and must not have a model yet."""
    layout: Literal["auto", "huggingface", "mamba_ssm", "official_jax", "run"] = "auto"
    """The layout of TO. auto: huggingface, or, if FROM has that, the other layout of its family: official_jax for TTT
    models, mamba_ssm for both Mambas, run for others."""
    step: CountOrZero | None = None
    """The checkpoint of a run; None is the newest."""
    train_state: bool = False
    """In the layout official_jax, write streaming_train_state at step 0 instead of streaming_params."""
    shard_bytes: Annotated[int, Range(least=1, most=2**50)] = 5 * 10**9
    """Largest size of one file of safetensors."""
    mixers: tuple[str, ...] = ()
    """Warm start: TO becomes a run whose model repeats these sequence layers and is initialised with the weights of
    FROM, a Transformer, where they fit."""
    backbone: Literal["transformer", "mamba"] = "transformer"
    """The backbone of TTT layers in a warm start."""
    zero_readout: bool = False
    """Warm start: keep all attention blocks of FROM and insert the others, so that the initial logits are those of
    FROM."""
    check_tokens: Annotated[int, Range(least=0, most=4096)] = 32
    """Number of random tokens for which logits are compared; 0 compares none."""
    seed: Seed = 0
    """The seed of these tokens."""
    json: bool = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    config = parse(ConvertConfig, arguments, prog=program("convert"), description=DESCRIPTION)
    if len(config.folders) != 2:
        raise InputError(
            f"name two folders, FROM and TO, got {len(config.folders)}, for example: "
            "python -m tttlm.cli.convert runs/quickstart released"
        )
    source_path, target_path = (Path(name) for name in config.folders)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    from tttlm.interop.convert import convert, largest_difference

    if config.mixers:
        refuse_unused(config, "in a warm start (--mixers)", "step", "train_state", "shard_bytes", "json")
        if not config.zero_readout:
            refuse_unused(config, "in a warm start without --zero_readout", "check_tokens", "seed")
        return _warm_start(config, source_path, target_path)
    if config.zero_readout:
        raise InputError("--zero_readout is for a warm start: name the sequence layers with --mixers")
    refuse_unused(config, "without --mixers", "backbone")
    if not config.check_tokens:
        refuse_unused(config, "with check_tokens = 0", "seed")
    source, origin = _open(source_path, config.step)
    layout = _other_layout(source) if config.layout == "auto" else config.layout
    if config.train_state and layout != "official_jax":
        raise InputError(f"--train_state is for the layout official_jax, but TO has the layout {layout}")
    if layout in ("run", "official_jax"):
        refuse_unused(config, f"in the layout {layout}", "shard_bytes")
    if layout == "run":
        written = _write_run(source, source_path, target_path)
    else:
        written = convert(
            source,
            target_path,
            layout,
            origin=origin,
            shard_bytes=config.shard_bytes,
            train_state=config.train_state,
        )
        _write_card(source, target_path)
    difference = None
    if config.check_tokens:
        target, _ = _open(target_path, None)
        difference, scale = largest_difference(source, target, num_tokens=config.check_tokens, seed=config.seed)
        if not difference <= _AGREES * scale:
            raise CannotWrite(
                f"{target_path} computes other logits than {source_path}: they differ by {difference:.3g} where the "
                f"largest is {scale:.3g}; do not use it"
            )
    if config.json:
        tensors = [asdict(tensor) for tensor in written]
        record = {"from": str(source_path), "to": str(target_path), "layout": layout, "tensors": tensors}
        print(json.dumps(record | {"check_tokens": config.check_tokens, "largest_difference": difference}, indent=1))
        return 0
    print(_table(written))
    print(f"{target_path}: {len(written):,} tensors in the layout {layout}")
    if difference is not None:
        print(f"logits of {config.check_tokens} random tokens agree: they differ by {difference:.3g} at most")
    return 0


def _return_freed_memory() -> None:
    """Has glibc return arrays to the system as soon as they are freed.

    By default it keeps what is freed in blocks of up to 32 MB, which is as much as the arrays of a conversion are.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no library of C, or another one
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _open(path: Path, step: int | None) -> tuple[Any, Any]:
    """The parameters in a folder, and its other files for a released folder."""
    from tttlm.interop.convert import FolderParameters
    from tttlm.interop.origin import Origin

    if not path.is_dir():
        raise InputError(f"{path} is no folder: name the folder of a run or of a released model")
    if (path / "config.yaml").is_file() and not (path / "config.json").exists():
        from tttlm.training.run_parameters import RunParameters

        run = RunParameters(path, step)
        if not run.folder.facts.exists():
            return run, None
        tokenizer = run.folder.read_tokenizer()
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        return run, Origin(str(run.folder.tokenizer), "", json.dumps({k: v for k, v in ids.items() if v is not None}))
    if step is not None:
        raise InputError(f"--step names a checkpoint of a run, but {path} is not a run")
    folder = FolderParameters(path)
    return folder, folder.origin


def _warm_start(config: ConvertConfig, source_path: Path, target_path: Path) -> int:
    """A run whose model begins with the weights of a Transformer."""
    from tttlm.interop import pretrained_config
    from tttlm.interop.convert import FolderParameters, largest_difference
    from tttlm.interop.warm_start import WarmParameters
    from tttlm.training.run_parameters import RunParameters, write_run

    if config.layout not in ("auto", "run"):
        raise InputError(f"a warm start makes a run, but --layout is {config.layout}: convert the run afterwards")
    num_layers, kept = pretrained_config(source_path).num_layers, config.mixers.count("attention")
    if config.zero_readout and kept:
        if num_layers % kept:
            raise InputError(
                f"--mixers has {kept} attention layers, which do not divide the {num_layers} of {source_path}: "
                "name a number of them that does"
            )
        num_layers = num_layers // kept * len(config.mixers)
    changes = {"mixers": config.mixers, "backbone": config.backbone, "num_layers": num_layers}
    parameters = WarmParameters(
        source_path, pretrained_config(source_path, **changes), zero_readout=config.zero_readout
    )
    write_run(target_path, parameters.config, parameters.read, _tokenizer(source_path))
    start = parameters.sources()
    print(start.report())
    print(f"{target_path}: {len(start.pretrained):,} pretrained, {len(start.new):,} new, {len(start.zeroed):,} zero")
    if config.zero_readout and config.check_tokens:
        pair = FolderParameters(source_path), RunParameters(target_path)
        difference, scale = largest_difference(*pair, num_tokens=config.check_tokens, seed=config.seed)
        if not difference <= _AGREES * scale:
            raise CannotWrite(f"the first logits of {target_path} are not those of {source_path}; do not use it")
        print(f"logits of {config.check_tokens} random tokens agree: they differ by {difference:.3g} at most")
    return 0


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a released folder; None, with a note, where it has none."""
    from tttlm.data import load_tokenizer

    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(folder)
    print(f"note: {folder} has no tokenizer, so that the run has none", file=sys.stderr)
    return None


def _write_card(source: Any, folder: Path) -> None:
    """Writes a model card with the results of the run that the model is from."""
    from tttlm.data.finding import printable
    from tttlm.evaluation.numbers import run_numbers
    from tttlm.interop.model_card import model_card
    from tttlm.training.run_parameters import RunParameters

    if isinstance(source, RunParameters) and not (folder / "README.md").exists():
        path = source.folder.path
        card = model_card(source.config, name=printable(path.absolute().name), numbers=run_numbers(path, source.step))
        (folder / "README.md").write_text(card, encoding="utf-8")


def _other_layout(source: Any) -> str:
    from tttlm.interop.convert import FolderParameters

    if not isinstance(source, FolderParameters) or source.checkpoint.architecture.layout != "huggingface":
        return "huggingface"
    name = source.checkpoint.architecture.name
    return {"ttt": "official_jax", "mamba": "mamba_ssm", "mamba2": "mamba_ssm"}.get(name, "run")


def _write_run(source: Any, source_path: Path, target: Path) -> list[Any]:
    from tttlm.interop.convert import Converted
    from tttlm.training.run_parameters import RunParameters, write_run

    if isinstance(source, RunParameters):
        tokenizer = source.folder.read_tokenizer() if source.folder.facts.exists() else None
    else:
        tokenizer = _tokenizer(source_path)
    written: list[Any] = []

    def read(path: tuple[Any, ...], repeat: int | None) -> Any:
        value = source.read(path, repeat)
        name = "/".join(map(str, path)) + ("" if repeat is None else f"[{repeat}]")
        written.append(Converted(name, source.name(path, repeat), value.shape, value.dtype.name))
        return value

    write_run(target, source.config, read, tokenizer)
    return written


def _table(written: list[Any]) -> str:
    rows = [("tensor", "from", "shape", "dtype")]
    rows += [(tensor.name, tensor.source, str(list(tensor.shape)), tensor.dtype) for tensor in written]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def run() -> None:
    _return_freed_memory()
    run_command(lambda: main(sys.argv[1:]), kept="FROM is unchanged")


if __name__ == "__main__":
    run()
