import logging
import warnings
from collections.abc import Iterator

import pytest

from randlora_pl.utils.text import filter_library_warnings

LIGHTNING = ("lightning.pytorch", "lightning.fabric")


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in LIGHTNING}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    "remark",
    [
        "The 'train_dataloader' does not have many workers which may be a bottleneck.",
        "Total length of `list` across ranks is zero. Please make sure this was your intention.",
    ],
)
def test_remarks_are_hidden_and_warnings_are_not(remark: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in LIGHTNING:
        logging.getLogger(name).setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.warn(remark, stacklevel=1)
        filter_library_warnings()
        warnings.warn(remark, stacklevel=1)
        warnings.warn_explicit("Corrupt EXIF data.", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
        warnings.warn("the loss is strange", stacklevel=1)
    assert [str(each.message) for each in told] == [remark, "the loss is strange"]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").info("GPU available: False")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("no GPU")
    assert "no GPU" in caplog.text and "GPU available" not in caplog.text
