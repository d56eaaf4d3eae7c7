"""A trained run, read back from its folder: the model, its tokenizer, and its score on text."""

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import yaml
from flax import nnx

from tttlm.data import Document, Tokenizer, encode_file, held_out_documents, load_tokenizer
from tttlm.errors import InputError
from tttlm.evaluation.loss import Chunk, Score, stream_score
from tttlm.model import LanguageModel, ModelConfig
from tttlm.progress import progress_bar
from tttlm.training.checkpoints import load_params
from tttlm.training.config import TrainConfig, from_dict
from tttlm.training.run_folder import RunFolder
from tttlm.training.step import Model


@dataclass(frozen=True)
class Run:
    """What a run has come to.

    Attributes:
        folder: where it lies.
        config: what it was trained with.
        step: the step of the checkpoint that was read.
        model: the language model with the parameters of that step.
    """

    folder: RunFolder
    config: TrainConfig
    step: int
    model: LanguageModel

    @property
    def data_folder(self) -> Path:
        """The prepared folder that the run's held-out documents are in."""
        data = self.config.data
        return Path(data.validation_path or data.path or next(iter(data.mixture)))

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.data_folder)

    def held_out(self, limit: int = 0) -> Iterator[Document]:
        """The held-out documents, until `limit` bytes of text are reached; 0 gives all."""
        total = 0
        for document in held_out_documents(self.data_folder):
            yield document
            total += document.bytes
            if limit and total >= limit:
                return

    def score(
        self,
        documents: Iterable[Iterable[Chunk]],
        *,
        rows: int,
        chunk: int,
        total: int | None = None,
        longest: int | None = None,
    ) -> Score:
        """See `stream_score`; shows a progress bar of `total` bytes. Caches get room for the `longest` document."""
        chunk = -(-chunk // self.config.align) * self.config.align
        model = self.model
        if longest is not None and "attention" in self.config.model.mixers:
            room = with_room(self.config.model, -(-longest // chunk) * chunk)
            model = Model(room).bind(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        with progress_bar(total, "scoring", unit="B") as bar:
            return stream_score(
                model, documents, rows=rows, chunk=chunk, align=self.config.align, on_progress=bar.update
            )

    def score_held_out(self, *, limit: int = 0, rows: int = 16, chunk: int = 256) -> Score:
        """The score of the held-out documents, each read from its start."""
        sizes = [document.bytes for document in self.held_out(limit)]
        rows = min(rows, max(1, sum(sizes) // max(sizes)))  # more would stand idle while the longest is read
        chunks = ([(document.tokens, document.bytes)] for document in _long_first(self.held_out(limit)))
        longest = max(len(document.tokens) for document in self.held_out(limit))
        return self.score(chunks, rows=rows, chunk=chunk, total=sum(sizes), longest=longest)

    def score_file(self, path: Path, *, chunk: int = 2048) -> Score:
        """The score of a text file as one document, of any length in constant memory.

        The cache of attention over the whole past is no constant: it gets room for all of the text.
        """
        size = path.stat().st_size if path.suffix not in (".gz", ".zst", ".xz") else None
        longest = None
        if "attention" in self.config.model.mixers:
            longest = sum(len(tokens) for tokens, _ in encode_file(path, self.tokenizer()))
        return self.score([encode_file(path, self.tokenizer())], rows=1, chunk=chunk, total=size, longest=longest)

    def held_out_gzip(self, limit: int = 0) -> float:
        """Bits per byte that `gzip -9` needs for the held-out documents joined."""
        tokenizer = self.tokenizer()
        text = "".join(tokenizer.decode(document.tokens.tolist()) for document in self.held_out(limit)).encode()
        return 8 * len(gzip.compress(text, 9)) / len(text)


def load_run(path: str | Path, step: int | None = None, *, max_length: int | None = None) -> Run:
    """Reads the parameters of a run's newest checkpoint, or that of `step`.

    Args:
        max_length: tokens that attention is to have room for; None as in the run.

    Raises:
        InputError: it is no run, or has no such checkpoint.
    """
    folder, config = RunFolder(path), run_config(path)
    model = Model(config.model if max_length is None else with_room(config.model, max_length))
    step, params = load_params(folder.checkpoints, model.shapes, step)
    return Run(folder, config, step, model.bind(params))


def run_config(path: str | Path) -> TrainConfig:
    """What the run in a folder was started with.

    Raises:
        InputError: it is no run, or its configuration cannot be used.
    """
    file = RunFolder(path).config
    try:
        return from_dict(TrainConfig, yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{path} is not the folder of a run: it has no config.yaml") from None
    except (InputError, yaml.YAMLError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be used: {error}".splitlines()[0]) from None


def with_room(config: ModelConfig, tokens: int) -> ModelConfig:
    """The same model, its attention caches as long as that."""
    return replace(config, attention=replace(config.attention, max_length=tokens))


def _long_first(documents: Iterator[Document], among: int = 256) -> Iterator[Document]:
    """Every so many documents the longest first, so that the rows of a score end at about the same time."""
    while batch := list(islice(documents, among)):
        yield from sorted(batch, key=lambda document: -len(document.tokens))
