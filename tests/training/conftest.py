"""Data and the model of the training tests."""

import logging
from pathlib import Path

import pytest

from tests.training.small import prepare_config, write_texts
from tttlm.data import prepare

logging.getLogger("absl").setLevel(logging.CRITICAL)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of bytes; read only."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(prepare_config(texts), folder)
    return folder
