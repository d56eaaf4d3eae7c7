"""The folder of a run: what lies where, its lock, and whether a run may go on in it."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

import yaml

from tttlm.errors import InputError
from tttlm.training.config import TrainConfig, differences, to_dict


class RunFolder:
    """Paths in a run's folder, and the lock that keeps a second process out of it.

    The lock is the operating system's: it goes with the process, however that ends, so there is nothing to clean up.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.facts = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def check_config(self, config: TrainConfig) -> None:
        """Refuses to go on with another configuration; writes nothing.

        Raises:
            InputError: names every field that differs.
        """
        if not self.config.exists():
            if self.checkpoints.exists():
                raise InputError(f"{self.path} holds checkpoints but no config.yaml: choose another --run")
            return
        try:
            saved = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{self.config} cannot be read: {error}".splitlines()[0]) from None
        if changed := differences(saved, config):
            raise InputError(
                f"{self.path} was started with another configuration ({'; '.join(changed)}): "
                "restore that, or choose another --run"
            )

    def claim(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        """Takes the folder for a run, by its first process alone; `facts` as for `check_data`.

        Raises:
            InputError: it is in use, or holds another run.
        """
        self.lock()
        self.check_config(config)
        self.check_data(facts)
        try:
            self.write_config(config)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}: make room, or choose another --run"
            ) from None

    def check_shared(self) -> None:
        """Refuses a folder that not every process sees, after it was claimed.

        Raises:
            InputError: it is not there.
        """
        if not self.config.exists():
            raise InputError(
                f"{self.path.absolute()} is another folder on {os.uname().nodename}: put it where all hosts share it"
            )

    def lock(self) -> None:
        """Takes the folder for this process, making it if need be.

        Raises:
            InputError: another process has it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (held while the run lasts)
        except OSError as error:
            raise InputError(f"{self.path}: the run's folder cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            self._lock = None
            raise InputError(f"{self.path} is in use by {holder}: wait for it, or choose another --run") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: TrainConfig) -> None:
        write_atomically(self.config, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))

    def check_data(self, facts: dict[str, Any]) -> None:
        """Records what the data is (`name: fingerprint`) the first time, and refuses other data after that.

        Raises:
            InputError: names what changed.
        """
        if self.facts.exists():
            saved = json.loads(self.facts.read_text(encoding="utf-8"))
            if changed := [name for name in facts if saved.get(name) != facts[name]]:
                raise InputError(
                    f"{self.path}: the {' and the '.join(changed)} changed since this run started: "
                    "restore what was there, or choose another --run"
                )
        else:
            write_atomically(self.facts, json.dumps(facts, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either whole or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
