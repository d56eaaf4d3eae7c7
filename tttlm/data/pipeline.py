"""The pipeline of `prepare`: documents are read in order, tokenized in many processes, and written to shards in order.

Documents become a sequence of events (a block of text, the end of a document, the end of a shard), which is cut into
batches for the workers. The bytes read decide where shards end, so the result depends on neither the number of
workers nor an interruption.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tttlm.data import store, writing
from tttlm.data.config import PrepareConfig
from tttlm.data.raw_document import RawDocument, Source
from tttlm.data.tokenizer import Tokenizer
from tttlm.data.workers import Encoded, Task, Workers, encode_task, workers
from tttlm.errors import InputError
from tttlm.progress import progress_bar

TASK_BYTES = 1 << 19  # bytes of text in a task of a worker


def held_out(key: int, fraction: float) -> bool:
    """Whether a document is for validation, decided by a hash of its content alone."""
    return key < fraction * 2**64


def split_of(document: RawDocument, fraction: float) -> str:
    """The split of a document: the one set by the source, else decided by its content."""
    return document.split or ("validation" if held_out(document.key, fraction) else "train")


@dataclass
class InProcess:
    """Tokenizes in this process, in place of `Workers`, if there is one core or little text."""

    tokenizer: Tokenizer
    dtype: str

    def submit(self, task: Task) -> "Future[list[Encoded]]":
        future: Future[list[Encoded]] = Future()
        future.set_result(encode_task(self.tokenizer, self.dtype, task))
        return future


def encoders(tokenizer: Tokenizer, dtype: str, count: int) -> AbstractContextManager["InProcess | Workers"]:
    return workers(tokenizer, dtype, count) if count > 1 else nullcontext(InProcess(tokenizer, dtype))


@dataclass
class _Open:
    """A document in the pipeline."""

    raw: RawDocument
    split: str
    bytes: int = 0
    tokens: int = 0
    offset: int = -1  # byte offset of its tokens in the shard; -1 before the first is written
    valid: bool = True


@dataclass(frozen=True)
class _Block:
    document: _Open
    data: bytes
    continues: bool


@dataclass(frozen=True)
class _EndOfDocument:
    document: _Open


@dataclass(frozen=True)
class _EndOfPart:
    position: Any
    empty: int


_Event = _Block | _EndOfDocument | _EndOfPart


class Job:
    """Reads documents, has the workers tokenize them, and writes shards; see the module."""

    def __init__(
        self,
        config: PrepareConfig,
        folder: Path,
        source: Source,
        tokenizer: Tokenizer,
        dtype: str,
        first_part: int,
        identity: str,
    ) -> None:
        self.config, self.folder, self.source, self.dtype = config, folder, source, dtype
        self.next_part, self._identity = first_part, identity
        self.parts: list[tuple[store.Part, store.PartFacts, dict[str, store.FileState]]] = []
        self.cut_rule = tokenizer.cut_rule
        self.bos = np.array([tokenizer.bos_id] if config.bos else [], dtype)
        self.eos = np.array([tokenizer.eos_id] if config.eos else [], dtype)
        self.writer: writing.PartWriter | None = None
        self.invalid_utf8 = 0
        self.empty_written = 0
        self.bytes_done = 0
        self.seconds = dict.fromkeys(("reading", "tokenizing", "writing"), 0.0)

    def run(self, pool: "InProcess | Workers", at_once: int) -> None:
        """Processes the source with at most `at_once` batches in flight, which bounds the memory."""
        pending: deque[tuple[list[_Event], int, Future]] = deque()
        batches = self._batches()
        try:
            with progress_bar(self.source.total, "preparing", unit="B", initial=self.source.read) as bar:
                more = True
                while more or pending:
                    with self._clock("reading"):
                        batch = next(batches, None)
                    more = batch is not None
                    if batch is not None:
                        with self._clock("tokenizing"):
                            task = [(event.data, event.continues) for event in batch if isinstance(event, _Block)]
                            pending.append((batch, self.source.read, pool.submit(task)))
                    if pending and (not more or len(pending) > at_once):
                        events, read, future = pending.popleft()
                        with self._clock("tokenizing"):
                            encoded = future.result()
                        with self._clock("writing"):
                            self._write(events, encoded)
                        bar.update(read - bar.n)
        finally:
            if self.writer:
                self.writer.discard()

    def _batches(self) -> Iterator[list[_Event]]:
        batch: list[_Event] = []
        size = 0
        for event in self._events():
            batch.append(event)
            size += len(event.data) if isinstance(event, _Block) else 0
            if size >= TASK_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _events(self) -> Iterator[_Event]:
        limit = int(self.config.shard_mb * 1e6)
        position, empty, in_part = self.source.position(), 0, 0
        for raw in self.source.documents():
            if in_part >= limit:
                yield _EndOfPart(position, empty)
                in_part = 0
            position, empty = self.source.position(), self.source.empty
            document = _Open(raw, split_of(raw, self.config.held_out))
            continues = False
            for block in self.cut_rule.blocks(raw.chunks, self._name(document)):
                yield _Block(document, block, continues)
                in_part += len(block)
                continues = True
            yield _EndOfDocument(document)
        if in_part:
            yield _EndOfPart(self.source.position(), self.source.empty)

    def _write(self, events: list[_Event], encoded: list[Encoded]) -> None:
        results = iter(encoded)
        for event in events:
            if isinstance(event, _EndOfPart):
                self._end_part(event)
                continue
            if self.writer is None:
                self.writer = writing.PartWriter(self.folder, self.next_part, self.dtype, self._identity)
            document = event.document
            if document.offset < 0:
                document.offset = self.writer.offset(document.split)
                self._put(document, self.bos)
            if isinstance(event, _Block):
                result = next(results)
                document.valid &= result.valid
                document.bytes += len(event.data)
                if document.valid or self.config.invalid_utf8 == "replace":
                    self._put(document, result.tokens)
                elif self.config.invalid_utf8 == "fail":
                    raise InputError(
                        f"{self._name(document)} is not valid UTF-8; repair it, or use --invalid_utf8 replace or skip"
                    )
            else:
                self._end_document(event)

    def _put(self, document: _Open, tokens: np.ndarray) -> None:
        assert self.writer is not None
        self.writer.write(document.split, tokens)
        document.tokens += len(tokens)

    def _name(self, document: _Open) -> str:
        name = self.source.names[document.raw.file]
        return f"{name}, record {document.raw.record + 1}" if document.raw.record else name

    def _end_document(self, event: _EndOfDocument) -> None:
        assert self.writer is not None
        document = event.document
        if not document.valid:
            self.invalid_utf8 += 1
            if self.config.invalid_utf8 == "skip":
                self.writer.cut(document.split, document.offset)
                return
        self._put(document, self.eos)
        self.bytes_done += document.bytes
        raw = document.raw
        name = self.source.names[raw.file]
        self.writer.end_document(document.split, document.tokens, document.bytes, raw.key, name, raw.record)

    def _end_part(self, event: _EndOfPart) -> None:
        assert self.writer is not None
        counts = store.Counts(event.empty - self.empty_written, self.invalid_utf8)
        self.empty_written = event.empty
        self.parts.append(self.writer.commit(event.position, counts))
        self.writer = None
        self.next_part += 1
        self.invalid_utf8 = 0

    @contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begin
