"""The toy task and its tokenizer, made once; everything in `tests/language` needs transformers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import refused, run

__all__ = ["refused", "run"]  # the command line in an empty folder

pytest.importorskip("transformers", reason="pip install 'randlora-pl[language]'")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .small import write_toy

    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .small import train_tokenizer

    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
