import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.adapters import RandLoRA
from randlora_pl.tasks import VisionLanguageTask
from tests.serving.server import Running, wait_until

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny CLIP with an update that counts, trained in a frame that is not the model's own."""
    torch.set_num_threads(1)
    task = VisionLanguageTask(adapter=RandLoRA(rank=6))
    task.set_classes(NAMES, ["An image of the digit {}"])
    task.adapt()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    frame: dict[str, Any] = {"size": 32, "mean": (0.4, 0.5, 0.6), "std": (0.5, 0.4, 0.5), "interpolation": "bilinear"}
    frame |= {"resize": "squash", "crop_pct": 0.9, "fill": (0, 0, 0)}
    return task.save(tmp_path_factory.mktemp("served") / "adapter", {"frame": frame, "dataset": "digits"})


@pytest.fixture(scope="session")
def digit() -> bytes:
    from sklearn.datasets import load_digits

    file = io.BytesIO()
    Image.fromarray((load_digits().images[3] * 15).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="package")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with small limits for all tests that leave it as it was; at its end nothing may be left of it."""
    log = tmp_path_factory.mktemp("server") / "log"
    running = Running(adapter, log, "--max-upload-mb", "2", "--max-pixels", "4000000", "--batch-size", "8")
    try:
        yield running.wait()
        family = running.family()
        assert len(family) >= 4
        assert running.end() == 143, log.read_text()
        assert wait_until(lambda: not running.family(), 10), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        running.kill()
