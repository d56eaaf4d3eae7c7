"""A trained run, read from its folder: the model, its tokenizer, and its score on text."""

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from tttlm.data import Document, Tokenizer, encode_file, held_out_documents
from tttlm.data.integrity import verify
from tttlm.errors import InputError
from tttlm.evaluation.loss import Chunk, Score, stream_score
from tttlm.inference import generate, with_room_for
from tttlm.model import LanguageModel
from tttlm.progress import progress_bar
from tttlm.training.checkpoint_files import load_params
from tttlm.training.config import TrainConfig, identity
from tttlm.training.run_folder import RunFolder
from tttlm.training.step import Model


@dataclass(frozen=True)
class Run:
    """A trained run.

    Attributes:
        folder: the run directory.
        config: the configuration of the training.
        step: the step of the checkpoint that was read.
        model: the language model with the parameters of that step.
    """

    folder: RunFolder
    config: TrainConfig
    step: int
    model: LanguageModel

    @cached_property
    def checked_data(self) -> Path:
        """The prepared folder of the run's held-out documents, which must be unchanged since the run started.

        A relative path is tried from the current folder, and then from where the run was started.

        Raises:
            InputError: the folder does not exist, was altered, or has other text.
        """
        data, facts = self.config.data, self.folder.read_facts()
        if data.generated.tasks:
            raise InputError(
                f"{self.folder.path} was trained on generated sequences ({', '.join(data.generated.tasks)}) and has no "
                "held-out text: measure --task recall, or name texts with --text"
            )
        named = Path(data.validation_path or data.path or next(iter(data.mixture)))
        folder = next((path for path in (named, Path(facts.held_out_folder)) if path.exists()), None)
        if folder is None:
            raise InputError(
                f"the held-out documents of {self.folder.path} were in {facts.held_out_folder}, which is not there: "
                "copy that folder to the same place, or score text files with --text"
            )
        if verify(folder).fingerprint != facts.held_out:
            raise InputError(
                f"{folder} has other held-out text than when {self.folder.path} was started: restore it, "
                "or score text files with --text"
            )
        return folder

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, from the run directory."""
        return self.folder.read_tokenizer()

    def held_out(self, limit: int = 0) -> Iterator[Document]:
        """The held-out documents, up to `limit` bytes of text; 0 yields all."""
        total = 0
        for document in held_out_documents(self.checked_data):
            yield document
            total += document.bytes
            if limit and total >= limit:
                return

    def score(
        self,
        documents: Iterable[Iterable[Chunk]],
        *,
        batch_size: int,
        chunk: int,
        total: int | None = None,
        longest: int | None = None,
    ) -> Score:
        """See `stream_score`; shows a progress bar of `total` bytes. Caches are as long as the `longest` document."""
        chunk = -(-chunk // self.config.align) * self.config.align
        model = self.model if longest is None else self.with_room_for(-(-longest // chunk) * chunk)
        with progress_bar(total, "scoring", unit="B") as bar:
            return stream_score(model, documents, batch_size=batch_size, chunk=chunk, on_progress=bar.update)

    def score_held_out(self, *, limit: int = 0, batch_size: int = 16, chunk: int = 256) -> Score:
        """The score of the held-out documents, each read from its start."""
        sizes = [document.bytes for document in self.held_out(limit)]
        if not any(sizes):
            raise InputError(f"{self.checked_data} has no held-out text to score: score text files with --text")
        batch_size = min(batch_size, max(1, sum(sizes) // max(sizes)))  # more would be idle while the longest is read
        chunks = ([(document.tokens, document.bytes)] for document in _long_first(self.held_out(limit)))
        longest = max(len(document.tokens) for document in self.held_out(limit))
        return self.score(chunks, batch_size=batch_size, chunk=chunk, total=sum(sizes), longest=longest)

    def score_file(self, path: Path, *, chunk: int = 2048) -> Score:
        """The score of a text file as one document, of any length in constant memory.

        The exception is the cache of full attention, which is as long as the text.
        """
        size = path.stat().st_size if path.suffix not in (".gz", ".zst", ".xz") else None
        longest = None
        if self.config.model.cache_length is not None:
            longest = sum(len(tokens) for tokens, _ in encode_file(path, self.tokenizer()))
        return self.score([encode_file(path, self.tokenizer())], batch_size=1, chunk=chunk, total=size, longest=longest)

    def sample(self, length: int = 200, *, prompt_tokens: int = 32) -> tuple[str, str]:
        """(prompt, continuation by the model); the prompt is the beginning of the first held-out document.

        Raises:
            InputError: there is no held-out text.
        """
        document = next((d for d in self.held_out() if len(d.tokens) > 1), None)
        if document is None:
            raise InputError(f"{self.checked_data} has no held-out text to begin with")
        tokenizer, prompt = self.tokenizer(), document.tokens[: prompt_tokens + 1].tolist()
        model = self.with_room_for(len(prompt) + length)
        written = generate(model, prompt, tokenizer, max_tokens=length, temperature=0.8, end_ids=())
        return tokenizer.decode(prompt[1:] if tokenizer.entry_id == prompt[0] else prompt), written[0].text

    def with_room_for(self, tokens: int) -> LanguageModel:
        """The model, with caches for so many tokens."""
        return with_room_for(self.model, tokens)

    def held_out_gzip(self, limit: int = 0) -> float:
        """Bits per byte that `gzip -9` needs for the held-out documents joined."""
        tokenizer = self.tokenizer()
        text = "".join(tokenizer.decode(document.tokens.tolist()) for document in self.held_out(limit)).encode()
        return 8 * len(gzip.compress(text, 9)) / len(text)


def load_run(path: str | Path, step: int | None = None, *, max_length: int | None = None) -> Run:
    """Reads the parameters of a run's newest checkpoint, or that of `step`.

    Args:
        max_length: length in tokens of the caches of attention; None as in the run.

    Raises:
        InputError: the path is not a run, or it has no such checkpoint.
    """
    folder, config = RunFolder(path), run_config(path)
    model = Model(config.model if max_length is None else config.model.with_cache_length(max_length))
    step, params = load_params(folder.checkpoints, model.shapes, step, run=identity(config))
    return Run(folder, config, step, model.bind(params))


def run_config(path: str | Path) -> TrainConfig:
    """The configuration that the run in a folder was started with.

    Raises:
        InputError: the path is not a run, or its configuration cannot be used.
    """
    return RunFolder(path).read_config()


def _long_first(documents: Iterator[Document], among: int = 256) -> Iterator[Document]:
    """Sorts groups of documents by length, longest first, so that parallel streams end at about the same time."""
    while batch := list(islice(documents, among)):
        yield from sorted(batch, key=lambda document: -len(document.tokens))
