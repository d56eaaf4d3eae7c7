"""The text of a comparison: prepared once; the text that is reported on uses the same tokenizer."""

from dataclasses import replace
from pathlib import Path

from tttlm.data import DataConfig, PrepareConfig, prepare
from tttlm.data.pipeline import held_out
from tttlm.data.sources import open_source
from tttlm.data.store import MANIFEST, read_manifest
from tttlm.errors import InputError


def prepared_data(text: str, config: DataConfig, folder: Path) -> DataConfig:
    """The configuration of the training data.

    Args:
        text: files or a folder of text, or a prepared folder; empty takes `config`.
        config: the configuration of preparation and layout.
        folder: the folder that `text` is prepared into.

    Raises:
        InputError: there is no text to train on, or text was named for generated sequences.
    """
    if config.generated.tasks:
        if text:
            raise InputError(f"the models are trained on generated sequences: leave out --data {text}")
        return config
    if not text:
        if config.prepare.given:
            prepare(config.prepare, config.path, wait=True)
        elif not (config.path or config.mixture):
            raise InputError("name the text to train on: --data FOLDER")
        return replace(config, prepare=PrepareConfig())
    if not (Path(text) / MANIFEST).exists():
        settings = replace(config.prepare, source=(text,))
        prepare(replace(settings, held_out=held_out_fraction(settings)), folder, wait=True)
        text = str(folder)
    return replace(config, path=text, mixture={}, prepare=PrepareConfig())


def prepared_test(text: str, data: Path, folder: Path) -> Path:
    """The prepared folder whose held-out documents are reported on: all of `text`, with the tokenizer of `data`."""
    if (Path(text) / MANIFEST).exists():
        return Path(text)
    manifest = read_manifest(data)
    settings = PrepareConfig(source=(text,), tokenizer=str(data), held_out=1.0, bos=manifest.bos, eos=manifest.eos)
    prepare(settings, folder, wait=True)
    return folder


def held_out_fraction(config: PrepareConfig) -> float:
    """`config.held_out`, or a larger fraction if that holds out no document.

    Raises:
        InputError: there are fewer than two documents.
    """
    keys = []
    for document in open_source(config).documents():
        if document.split == "validation":  # the end of a single file
            return config.held_out
        keys.append(document.key)
        if len({held_out(key, config.held_out) for key in keys}) == 2:
            return config.held_out
    if len(set(keys)) < 2:
        raise InputError(
            f"{config.source[0]} has {len(keys)} document{'s' * (len(keys) != 1)}: a comparison trains on some and "
            "holds others out, so it needs two; cut the text into several files"
        )
    lowest, next_lowest = sorted(set(keys))[:2]
    return min(max((lowest + next_lowest) / 2**65, 2**-64), 1 - 2**-32)


def tokenizer_of(data: DataConfig | Path) -> str:
    """The fingerprint of the tokenizer that a prepared folder was made with."""
    if isinstance(data, DataConfig):
        data = Path(data.path or next(iter(data.mixture)))
    return read_manifest(data).tokenizer.fingerprint
