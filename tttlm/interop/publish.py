"""Pushing models to the Hugging Face hub, with a model card."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tttlm.errors import InputError
from tttlm.interop.checkpoint import Checkpoint
from tttlm.interop.hub import WEIGHTS, in_one_line, is_repository
from tttlm.interop.model_card import model_card
from tttlm.interop.origin import FILES
from tttlm.interop.pretrained import save_pretrained
from tttlm.model import LanguageModel


def push_to_hub(
    model: LanguageModel | str | Path,
    repository: str,
    *,
    layout: str | None = None,
    numbers: Mapping[str, float | int | str] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Pushes a model to a repository of the hub, which is created if it does not exist, with a model card.

    Args:
        model: a model, or a released folder, for instance one that `tttlm-convert` made of a run.
        repository: `owner/name`.
        layout: as for `save_pretrained`, for a model.
        numbers: training and evaluation results for the model card, by name; an existing README.md of a folder is kept.
        private: whether a new repository is private; None: the owner's default.
        revision: the branch; None: the main branch.
        token: a token with write permission; None: the one that was saved by logging in, or `HF_TOKEN`.
        commit_message: message of the commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the model has no released layout, the hub refuses it, or `huggingface_hub` is not installed.
    """
    if not is_repository(repository):
        raise InputError(f"a repository is named owner/name, got {repository!r}")
    with contextlib.ExitStack() as stack:
        if isinstance(model, LanguageModel):
            folder, config = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model", model.config
            save_pretrained(model, folder, layout=layout)
        else:
            folder = Path(model)
            checkpoint = Checkpoint(folder)
            checkpoint.check()
            config = checkpoint.config
        with in_one_line(repository, revision):
            from huggingface_hub import HfApi

            hub = HfApi(token=token)
            hub.create_repo(repository, private=private, exist_ok=True)
            if not (folder / "README.md").exists():
                card = model_card(config, name=repository, numbers=numbers).encode()
                hub.upload_file(
                    path_or_fileobj=card,
                    path_in_repo="README.md",
                    repo_id=repository,
                    revision=revision,
                    commit_message="Add model card",
                )
            commit = hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=[*WEIGHTS, *FILES, "README.md"],
            )
            return str(commit.commit_url)
