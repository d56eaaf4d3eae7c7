"""Datasets of the Hugging Face hub, or anything else that `datasets.load_dataset` can name, as a source."""

from collections.abc import Iterator
from typing import Any

from tttlm.data.config import DatasetConfig
from tttlm.data.sources import RawDocument, keyed
from tttlm.data.text_files import as_text
from tttlm.errors import InputError


class DatasetSource:
    """One record a document, streamed or downloaded."""

    def __init__(self, config: DatasetConfig, column: str) -> None:
        self._config, self._column = config, column
        self.names = [config.name]
        self.total: int | None = None
        self.read = 0
        self.empty = 0
        self._data = self._load()
        columns = self._data.column_names
        if columns is not None and column not in columns:
            raise InputError(
                f"dataset {config.name} has no column {column!r}; "
                f"there are: {', '.join(columns)} (choose with --column)"
            )
        self._record = 0

    def _load(self) -> Any:
        import datasets

        config = self._config
        try:
            return datasets.load_dataset(
                config.name,
                config.config or None,
                split=config.split,
                data_files=list(config.data_files) or None,
                revision=config.revision or None,
                streaming=config.streaming,
            )
        except Exception as error:  # of many kinds: not found, no network, no such split, a script
            said = str(error).strip().splitlines()
            raise InputError(f"dataset {config.name} cannot be loaded: {said[0] if said else repr(error)}") from error

    def fingerprint(self) -> dict[str, Any]:
        config = self._config
        found: dict[str, Any] = {"dataset": config.name, "config": config.config, "split": config.split}
        found |= {"data_files": list(config.data_files), "revision": config.revision}
        if not config.streaming:
            found["rows"] = len(self._data)
        return found

    def position(self) -> dict[str, Any]:
        streamed = {"state": self._data.state_dict()} if self._config.streaming else {}
        return {"record": self._record, **streamed}

    def seek(self, position: dict[str, Any]) -> None:
        self._record = position["record"]
        if self._config.streaming:
            self._data.load_state_dict(position["state"])

    def documents(self) -> Iterator[RawDocument]:
        data = self._data if self._config.streaming else self._data.skip(self._record)
        for record in data:
            number, self._record = self._record, self._record + 1
            text = as_text(record, f"dataset {self._config.name}, record {number + 1}", self._column)
            if not text:
                self.empty += 1
                continue
            self.read += len(text)
            yield RawDocument(0, number, keyed((text,))[0], iter((text,)))
