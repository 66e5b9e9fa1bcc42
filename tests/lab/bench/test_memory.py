import os
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

from randlora_pl.adapters import RandLoRA, inject
from randlora_pl.lab import bench
from randlora_pl.lab.bench import is_out_of_memory, max_rss, rss_elsewhere, saved_tensors


def test_a_linear_layer_keeps_its_input() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(5, 8)
    with saved_tensors(layer.parameters()) as saved:
        layer(x).sum().backward()
    assert sum(saved.values()) == 5 * 8 * 4
    with saved_tensors([*layer.parameters(), x]) as saved:
        layer(x).sum().backward()
    assert sum(saved.values()) == 0


def test_an_adapted_layer_keeps_its_built_weight_only_if_it_is_to() -> None:
    for option, built in (("fast", 16 * 8 * 4), ("low", 0)):
        model, x = nn.Sequential(nn.Linear(8, 16)), torch.randn(400, 8, requires_grad=True)
        inject(model, RandLoRA(rank=2, memory=option), ["all"])
        with saved_tensors([*model.parameters(), *model.buffers()]) as saved:
            model(x).sum().backward()
        assert sum(saved.values()) == 400 * 8 * 4 + built


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(10, 4, requires_grad=True) * 1
    with saved_tensors([]) as saved:
        (x[:2].exp() + x[1:3].sin()).sum().backward()
    assert sum(saved.values()) == 10 * 4 * 4 + 2 * 4 * 4  # all of x for the two rows of sin; exp keeps its result


def big() -> None:
    bytearray(300_000_000)[::4096] = b"x" * (300_000_000 // 4096 + 1)


def killed() -> None:
    os._exit(9)


@pytest.mark.slow
def test_the_resident_set_is_that_of_a_process_of_its_own() -> None:
    assert max_rss() > 10_000_000
    small = rss_elsewhere(len, "")
    large = rss_elsewhere(big)
    assert small is not None and large is not None and large - small > 200_000_000
    assert rss_elsewhere(killed) is None


def test_without_a_status_file_the_system_call_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("randlora_pl.run.callbacks.progress")  # its packages read files
    monkeypatch.setattr(bench.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert max_rss() > 10_000_000
    monkeypatch.setitem(sys.modules, "resource", None)
    assert max_rss() == 0


def test_allocators_without_memory_are_recognised() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


def test_a_process_that_fails_has_no_size() -> None:
    assert rss_elsewhere(divmod, 1, 0) is None
