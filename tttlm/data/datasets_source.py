"""Datasets of the Hugging Face hub, or anything else that `datasets.load_dataset` can name, as a source."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tttlm.data.config import DatasetConfig
from tttlm.data.finding import Skipped
from tttlm.data.raw_document import FileDigests, RawDocument, keyed
from tttlm.data.store import file_state
from tttlm.data.text_files import as_text
from tttlm.errors import InputError


class DatasetSource:
    """The records of a dataset, each a document, streamed or downloaded.

    Args:
        config: the dataset.
        column: the column that holds the text.

    Raises:
        InputError: the dataset cannot be loaded, or has no such column.
    """

    def __init__(self, config: DatasetConfig, column: str) -> None:
        self._config, self._column = config, column
        self.names = [config.name]
        self.total: int | None = None
        self.read = 0
        self.empty = 0
        self.skipped = Skipped()
        self.digests: FileDigests = {}
        self._record = 0
        try:
            self._files, self._data = self._load()
            columns = self._data.column_names
        except Exception as error:  # of many kinds: not found, no network, no such split, a script
            reason = next(iter(str(error).strip().splitlines()), repr(error))[:300]
            if type(error).__name__ == "DatasetGenerationError":  # its own message has no reason
                reason = _first_line(error)
            raise InputError(f"dataset {config.name} cannot be loaded: {reason}") from error
        if columns is not None and column not in columns:
            raise InputError(
                f"dataset {config.name} has no column {column!r}; "
                f"there are: {', '.join(columns)} (choose with --column)"
            )

    def _load(self) -> tuple[dict[str, Any], Any]:
        """(files of the dataset by split, dataset)."""
        import datasets

        config = self._config
        named: dict[str, Any] = {
            "path": config.name,
            "name": config.config or None,
            "data_files": list(config.data_files) or None,
            "revision": config.revision or None,
        }
        data_files = datasets.load_dataset_builder(**named).config.data_files or {}
        files = {str(split): [list(map(str, paths)), paths.origin_metadata] for split, paths in data_files.items()}
        return files, datasets.load_dataset(**named, split=config.split, streaming=config.streaming)

    def fingerprint(self, digests: FileDigests) -> dict[str, Any]:
        """The name of the dataset and a digest of its files: local ones by their content, others by their version."""
        config = self._config
        digest = hashlib.sha256()
        for split, (paths, versions) in sorted(self._files.items()):
            for i, path in enumerate(paths):
                digest.update(f"{split}\0{self._content(Path(path), digests) or path}\n".encode("utf-8", "replace"))
                if not Path(path).is_file() and i < len(versions):
                    digest.update(repr(versions[i]).encode())
        facts: dict[str, Any] = {"dataset": config.name, "config": config.config, "split": config.split}
        facts |= {"data_files": list(config.data_files), "revision": config.revision}
        return {**facts, "sha256": digest.hexdigest()}

    def _content(self, path: Path, digests: FileDigests) -> str:
        """The digest of a local file; "" if the path is not one."""
        name = str(path.absolute())
        try:
            if not path.is_file():
                return ""
            state = file_state(path)
            if name not in digests or digests[name][0] != state:
                with open(path, "rb") as stream:
                    digests = {name: (state, hashlib.file_digest(stream, "sha256").hexdigest())}
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        self.digests[name] = digests[name]
        return digests[name][1]

    def position(self) -> dict[str, Any]:
        streamed = {"state": self._data.state_dict()} if self._config.streaming else {}
        return {"record": self._record, **streamed}

    def seek(self, position: dict[str, Any]) -> None:
        self._record = position["record"]
        if self._config.streaming:
            self._data.load_state_dict(position["state"])

    def documents(self) -> Iterator[RawDocument]:
        records = iter(self._data if self._config.streaming else self._data.skip(self._record))
        while True:
            where = f"dataset {self._config.name}, record {self._record + 1}"
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # of as many kinds as there are formats and networks
                raise InputError(
                    f"{where}: cannot be read ({_first_line(error)}); finished shards are kept: "
                    "the same command resumes after them"
                ) from error
            number, self._record = self._record, self._record + 1
            text = as_text(record, where, self._column)
            if not text:
                self.empty += 1
                continue
            self.read += len(text)
            yield RawDocument(0, number, keyed((text,))[0], iter((text,)))


def _first_line(error: BaseException) -> str:
    """The first line of the message of the error that was the first cause of this one."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return next(iter(str(error).strip().splitlines()), repr(error))[:300]
