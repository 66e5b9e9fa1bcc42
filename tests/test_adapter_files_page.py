"""The page about adapter files tells the truth: its commands and code run here in their order, fits shortened."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from randlora_pl.models import load_clip
from tests.docs.pages import joined
from tests.test_readme import ROOT, SHORT, run

TEXT = (ROOT / "docs" / "adapter_files.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TEXT, flags=re.S)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, in which the page's code and commands run."""
    pytest.importorskip("onnxruntime", reason='the page needs the extra: pip install ".[onnx]"')
    pytest.importorskip("peft", reason="the page needs peft")
    folder = tmp_path_factory.mktemp("page")
    before, threads = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    os.chdir(folder)
    yield folder
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    os.chdir(before)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_everything_on_the_page(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {
        "images": torch.randn(2, 3, 32, 32),
        "pixels": np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32),
        "model": load_clip("tiny").model,
        "base": load_clip("tiny").model,
    }
    commands = [line for kind, body in BLOCKS if kind == "sh" for line in joined(body)]
    assert len(commands) >= 12 and sum(kind == "python" for kind, _ in BLOCKS) >= 4
    for kind, body in BLOCKS:
        if kind == "python":
            exec(body, names)
            continue
        for command in joined(body):
            words = command.removeprefix("randlora-pl ")
            run(words, *(SHORT if words.startswith("fit ") else ()))
    printed = capsys.readouterr().out
    assert "fingerprint" in printed and "largest difference" in printed
    probabilities, classnames = names["probabilities"], names["classnames"]
    assert isinstance(probabilities, np.ndarray) and probabilities.shape == (2, 10)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert isinstance(classnames, list) and classnames[:3] == ["zero", "one", "two"]
    assert len(Path("both.csv").read_text().splitlines()) == 1 + 2 * 5
    assert not [path for path in home.iterdir() if path.name.startswith(".")]
