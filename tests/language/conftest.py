"""The toy task and its tokenizer, made once; everything in `tests/language` needs transformers."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="pip install '.[language]'")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .small import write_toy

    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .small import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
