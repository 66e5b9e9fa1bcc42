"""Kept buffers of a file that was made by hand are refused if a forward pass would fail with them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import SVFT, AdaLoRA, Adapter, AutoLoRA, SHiRA, inject, load_adapter, save_adapter
from randlora_pl.adapters.save_load import CONFIG, TENSORS, load_tensors, save_tensors
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item


def _set(place: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda kept: kept.index_fill(0, torch.tensor(place), value)


SHIRA, TOP_K = SHiRA(rank=1), SVFT(pattern="top_k", off_diagonals=1)
IMPOSSIBLE: list[tuple[Adapter, Callable[[Tensor], Tensor], str]] = [
    *((SHIRA, _set(*change), r"fc\.delta\.places must be distinct places from 0 to 24, in asc") for change in [
        (0, -1), (-1, 25), (-1, 2**31 - 1),
    ]),
    *((TOP_K, _set(*change), r"places must be distinct places from 0 to 24") for change in [(0, -1), (-1, 25)]),
    *((each, lambda kept: kept[:1].expand_as(kept), "distinct places") for each in (SHIRA, TOP_K)),
    (SHIRA, lambda kept: kept.flip(0), "ascending order"),
    (SHIRA, lambda kept: kept.long() - 2**40, "distinct places"),
    (SHIRA, lambda kept: kept + 0.5, r"places is torch\.float32 in the file and torch\.int32 here"),
    (SHIRA, lambda kept: kept[1:], r"has shape \(9,\) in the file and \(10,\) here"),
    (AdaLoRA(rank=3), lambda kept: kept.float(), r"mask is torch\.float32 in the file and torch\.bool here"),
    (AdaLoRA(rank=3), lambda kept: kept[1:], r"mask has shape \(2,\) in the file and \(3,\) here"),
    (AutoLoRA(rank=3), lambda kept: kept.bool(), r"v is torch\.bool in the file and torch\.float32 here"),
    (AutoLoRA(rank=3), lambda kept: kept[1:], r"v has shape \(2,\)"),
]  # fmt: skip


@in_one_item(("adapter", "change", "message"), IMPOSSIBLE)
def test_impossible_kept_buffers_are_refused(
    adapter: Adapter, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    """Into the base model, and into one with the same adapter."""
    base = nn.ModuleDict({"fc": nn.Linear(5, 5)})
    model = copy.deepcopy(base)
    report = inject(model, adapter, ["fc"])
    if report.procedure is not None:
        report.procedure.ran = True
    save_adapter(model, tmp_path / "a")
    load_adapter(copy.deepcopy(base), tmp_path / "a")
    tensors, config = load_tensors(tmp_path / "a" / TENSORS), json.loads((tmp_path / "a" / CONFIG).read_text())
    (name,) = config["kept"]
    del config["sha256"]
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    save_tensors({**tensors, name: change(tensors[name]).contiguous()}, tmp_path / "a" / TENSORS)
    before = copy.deepcopy(model.state_dict())
    for other in (base, model):
        with pytest.raises(UserError, match=message) as refusal:
            load_adapter(other, tmp_path / "a")
        assert "\n" not in str(refusal.value)
    assert not hasattr(base, "adapter_report")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
