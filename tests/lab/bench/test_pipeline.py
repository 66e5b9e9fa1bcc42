from pathlib import Path

import pytest
import torch

from randlora_pl.data import ImageData
from randlora_pl.lab.bench.pipeline import PLAIN, Plain, cases
from tests.data.conftest import Tree
from tests.data.conftest import tree as tree  # the fixture
from tests.support.products import marked


def data_of(**options: object) -> ImageData:
    data = ImageData(batch_size=4, steps=6, image_size=16, cache_images=False, **options)
    data.setup("fit")
    return data


@pytest.mark.parametrize(("kind",), marked([("folder",), ("digits",)], lambda row: row == ("folder",)))
def test_every_stage_gives_a_rate(tree: Tree, kind: str) -> None:
    root = str(tree(cat=9, dog=9)) if kind == "folder" else None
    measured = cases(data_of(dataset=kind, root=root), workers=1)
    assert ("read" in [case.name for case in measured]) == (kind == "folder")
    assert measured[-1].name == PLAIN and [case.whole for case in measured[-5:]] == [True] * 5
    for case in measured:
        assert case.run() > 0


def test_the_plain_pipeline_prepares_the_same_images(tree: Tree) -> None:
    data = data_of(dataset="folder", root=str(tree(cat=9, dog=9)), crop_scale=(1.0, 1.0), flip=False)
    samples, plain = data.samples("train"), Plain(data.samples("train"), data)
    assert len(plain) == len(samples)
    image, label = plain[3]
    assert image.shape == (3, 16, 16) and label == samples.labels[3]
    pixels = torch.from_numpy(samples.images.load(int(samples.rows[3]))).float().mean((0, 1)) / 255
    assert torch.allclose(
        image.mean((1, 2)) * torch.tensor(data.frame.std) + torch.tensor(data.frame.mean), pixels, atol=0.02
    )
    assert Path(samples.images.name(0)).exists()
