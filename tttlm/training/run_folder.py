"""The run directory: the paths of its files, its lock, and the check whether a run may resume in it."""

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

import tttlm
from tttlm.data import Tokenizer, load_tokenizer, save_tokenizer
from tttlm.data.tokenizer_files import FACTS as TOKENIZER_FACTS
from tttlm.errors import InputError
from tttlm.fields import from_values
from tttlm.records import read_record, read_text, write_file, write_json
from tttlm.training.checkpoint_files import saved_steps
from tttlm.training.config import TrainConfig, differences, to_dict
from tttlm.yaml_file import parse_yaml

# Errors of file systems without locks, on which a lock file is used instead.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_HEAD = re.compile(r"# tttlm (\S+), sha256 of what follows: ([0-9a-f]{64})\n")


@dataclass(frozen=True)
class RunFacts:
    """Data and tokenizer of a run, stored in `data.json`.

    Attributes:
        data: the fingerprint of the training batches.
        tokenizer: the fingerprint of the tokenizer.
        held_out: the fingerprint of the folder with the held-out documents.
        held_out_folder: the absolute path of that folder; "" for generated sequences.
    """

    data: str
    tokenizer: str
    held_out: str
    held_out_folder: str


class RunFolder:
    """Paths in a run directory, and the lock against a second process.

    The lock ends with the process, also when it is killed, so there is nothing to clean up.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.facts = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self._holder = self.path / "in_use_by"
        self._lock: BaseFileLock | None = None
        self._made: Path | None = None  # the topmost folder that was created for this run
        self._before: dict[Path, bytes | None] = {}  # content of files before this run wrote them

    def read_config(self) -> TrainConfig:
        """The configuration that the run was started with.

        Raises:
            InputError: this is not a run directory, its configuration was altered, or another version wrote it.
        """
        return from_values(TrainConfig, self._read_config(), str(self.config))

    def _read_config(self) -> Any:
        if not self.config.exists():
            raise InputError(f"{self.path} is not a run directory: it has no {self.config.name}")
        text = read_text(self.config, advice="restore the file that the run wrote")
        head = _HEAD.match(text)
        if head is None:
            raise InputError(
                f"{self.config} was not written by this version of tttlm ({tttlm.__version__}): runs of version 0.1.0 "
                "need that version; train again in another run directory, or restore the file that the run wrote"
            )
        version, digest = head.groups()
        if hashlib.sha256(text[head.end() :].encode()).hexdigest() != digest:
            raise InputError(
                f"{self.config} was altered since the run wrote it: restore it, and change fields on the command "
                "line instead"
            )
        if version.split(".")[:2] != tttlm.__version__.split(".")[:2]:
            raise InputError(
                f"{self.path} is a run of version {version} of tttlm, this is {tttlm.__version__}: use that version, "
                "or train again in another run directory"
            )
        try:
            return parse_yaml(text)
        except InputError as error:
            raise InputError(f"{self.config}: {error}") from None

    def check_config(self, config: TrainConfig) -> None:
        """Refuses to resume with another configuration; writes nothing.

        Raises:
            InputError: names every field that differs.
        """
        if not self.config.exists():
            if self.checkpoints.exists():
                raise InputError(f"{self.path} has checkpoints but no {self.config.name}: choose another --run")
            return
        if changed := differences(to_dict(self.read_config()), config):
            raise InputError(
                f"{self.path} was started with another configuration ({'; '.join(changed)}): "
                "restore that, or choose another --run"
            )

    def claim(self, config: TrainConfig, facts: RunFacts, tokenizer: Tokenizer) -> None:
        """Claims the folder for a run; called by process 0 only.

        Until `keep` is called, `release` restores the previous content.

        Raises:
            InputError: the folder is in use, has another run, or cannot be written.
        """
        self.lock()
        self.check_config(config)
        self._check_data(facts)
        try:
            self._write(self.config, with_head(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)))
            if not self.facts.exists():
                self._before[self.facts] = None
                write_json(self.facts, facts)
            if not (self.tokenizer / TOKENIZER_FACTS).exists():  # it is written last
                self.keep_tokenizer(tokenizer)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}: fix this, or choose another --run"
            ) from None

    def check_shared(self) -> None:
        """Refuses a claimed folder that this process does not see.

        Raises:
            InputError: the folder does not exist here.
        """
        if not self.config.exists():
            raise InputError(
                f"{self.path.absolute()} is another folder on {platform.node()}: use a file system that all hosts share"
            )

    def lock(self) -> None:
        """Locks the folder for this process; creates it if it does not exist.

        Raises:
            InputError: another process has the lock, or the folder cannot be created.
        """
        try:
            new = [parent for parent in (self.path, *self.path.parents) if not parent.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = new[-1] if new else None
            self._lock = self._acquire()
            if self._lock is not None:
                write_file(self._holder, f"process {os.getpid()} on {platform.node()}\n".encode())
                return
        except OSError as error:
            self._made = None
            raise InputError(
                f"{self.path}: the run directory cannot be created or locked: {error.strerror or error}"
            ) from None
        holder = "another process"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = self._holder.read_text(encoding="utf-8")[:200].strip() or holder
        raise InputError(f"{self.path} is in use by {holder}: wait for it, or choose another --run")

    def _acquire(self) -> BaseFileLock | None:
        """The lock, or None if another process has it."""
        for kind, name in ((FileLock, "lock"), (SoftFileLock, "lock.soft")):
            lock = kind(self.path / name)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about a file system without locks
                    lock.acquire(blocking=False)
                return lock
            except Timeout:
                return None
            except OSError as error:
                if kind is SoftFileLock or error.errno not in _NO_LOCKS:
                    raise
            except NotImplementedError:
                continue
        return None

    def keep(self) -> None:
        """Keeps the files that `claim` wrote, because the run has started."""
        self._made, self._before = None, {}

    def release(self) -> None:
        """Releases the folder; if the run never started, its files are removed."""
        if self._lock is None:
            if self._made is not None:  # refused while it was being locked
                self._remove_made()
            return
        self._holder.unlink(missing_ok=True)
        for path, content in self._before.items():
            with contextlib.suppress(OSError):
                if path.is_dir():
                    shutil.rmtree(path)
                elif content is None:
                    path.unlink(missing_ok=True)
                else:
                    write_file(path, content)
        self._lock.release()
        self._lock = None
        if self._made is not None:
            self._remove_made()
        self._before = {}

    def _remove_made(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that another process uses by now
            for parent in self.path.parents:
                if self._made is None or not parent.is_relative_to(self._made):
                    break
                parent.rmdir()
        self._made = None

    def read_facts(self) -> RunFacts:
        """Data and tokenizer of the run.

        Raises:
            InputError: the file cannot be read.
        """
        return read_record(self.facts, RunFacts, advice="restore the file that the run wrote")

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with, from the run directory.

        Raises:
            InputError: it is missing or was altered.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.fingerprint != self.read_facts().tokenizer:
            raise InputError(
                f"{self.tokenizer} is not the tokenizer that the run was trained with; restore the files that it wrote"
            )
        return tokenizer

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Writes the tokenizer into the run's folder."""
        self._before[self.tokenizer] = None
        save_tokenizer(tokenizer, self.tokenizer)

    def _check_data(self, facts: RunFacts) -> None:
        """Refuses other data or another tokenizer than the run was started with."""
        if not self.facts.exists() and not saved_steps(self.checkpoints):
            return
        saved = self.read_facts()
        names = {"data": "data", "tokenizer": "tokenizer", "held_out": "held-out text"}
        if changed := [what for name, what in names.items() if getattr(saved, name) != getattr(facts, name)]:
            raise InputError(
                f"{self.path}: the {' and the '.join(changed)} changed since this run started: "
                "restore it, or choose another --run"
            )

    def _write(self, path: Path, text: str) -> None:
        self._before.setdefault(path, path.read_bytes() if path.exists() else None)
        write_file(path, text.encode())


def with_head(text: str) -> str:
    """The text of a run's configuration after the line with its version and digest."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"# tttlm {tttlm.__version__}, sha256 of what follows: {digest}\n{text}"


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
