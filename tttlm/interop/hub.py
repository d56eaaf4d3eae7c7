"""Models on the Hugging Face hub, fetched into its cache through `huggingface_hub`, the extra `hub`."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tttlm.errors import InputError
from tttlm.extras import missing
from tttlm.interop.origin import FILES

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What is fetched and pushed beside the tokenizer's files; weights in other formats have other names.
WEIGHTS = (
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("model_config.json", "streaming_params*", "streaming_train_state*"),
)


def is_repository(name: str) -> bool:
    """Whether a name that is not a folder has the form of a repository, `owner/name`."""
    return bool(_REPOSITORY.fullmatch(name)) and "--" not in name and ".." not in name


def fetch(
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a repository in the hub's cache, after fetching missing files.

    Configuration, safetensors or streams, and the tokenizer's files are fetched, but no pickled files.

    Args:
        repository: `owner/name`.
        revision: a branch, tag or commit; None: the main branch.
        cache_dir: the cache; None: that of `HF_HOME` or `HF_HUB_CACHE`.
        token: for private and gated repositories; None: the one that was saved by logging in, or `HF_TOKEN`.
        local_files_only: use what is in the cache and no network, as `HF_HUB_OFFLINE=1` does for a whole process.

    Raises:
        InputError: there is no such repository or revision, it is not in the cache and cannot be fetched, or
            `huggingface_hub` is not installed.
    """
    with in_one_line(repository, revision):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=[*WEIGHTS, *FILES],
            )
        )


@contextlib.contextmanager
def in_one_line(repository: str, revision: str | None) -> Iterator[None]:
    """Turns exceptions of the hub's library into one line."""
    if absent := missing("huggingface_hub"):
        raise InputError(absent)
    from huggingface_hub import errors

    at = f"{repository}" if revision is None else f"{repository} at revision {revision!r}"
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        why = "is gated: ask for access on its page, and give a token of that account"
        raise InputError(f"{repository} {why}") from None
    except errors.RepositoryNotFoundError:
        why = "is not on the hub, or is private: check the name, or give a token"
        raise InputError(f"{repository} {why}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repository} has no revision {revision!r}: name a branch, a tag or a commit") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = "is not in the hub's cache and cannot be fetched: check the network, HF_HUB_OFFLINE and the cache"
        raise InputError(f"{at} {why}") from None
    except Exception as error:
        raise InputError(f"{at}: the hub cannot be used ({_first_line(error)})") from None


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
