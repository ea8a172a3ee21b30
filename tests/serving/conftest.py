"""What several tests of served files use."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.words import byte_tokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    byte_tokenizer().save_pretrained(folder)
    return folder
