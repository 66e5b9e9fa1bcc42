"""Devices that are not here, and the precision of predict and serve."""

import pytest
import torch

from randlora_pl.utils.device import choose_as_on_cuda, on_cuda
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.machine import use_precision
from tests.support.products import in_one_item


def test_implementations_for_cuda_are_chosen_elsewhere_inside_the_block_only() -> None:
    tensor = torch.zeros(1)
    assert not on_cuda(tensor)
    with pytest.raises(ZeroDivisionError), choose_as_on_cuda():
        with choose_as_on_cuda():
            assert on_cuda(tensor)
        assert on_cuda(tensor)
        raise ZeroDivisionError
    assert not on_cuda(tensor)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@in_one_item(
    ("name", "device", "capability", "says"),
    [
        ("tf32", "cpu", (8, 0), "this is the device cpu. Use --precision bf16 or 32."),
        ("tf32", "mps", (8, 0), "this is the device mps. Use --precision 32."),
        ("tf32", "cuda", (7, 5), "and this is Tesla. Use --precision 32."),
        ("bf16", "cuda", (7, 0), "bf16: cuda has no fast bfloat16. Use --precision 32."),
        ("32", "cuda", (7, 0), ""),
        ("bf16", "cpu", (7, 0), ""),
        ("bf16", "cuda", (8, 0), ""),
        ("tf32", "cuda", (8, 6), ""),
    ],
)
def test_what_a_device_cannot_do_is_refused(
    name: str, device: str, capability: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", lambda device: True)
    before = torch.get_float32_matmul_precision()
    try:
        if says:
            with pytest.raises(UserError) as caught:
                use_precision(name, torch.device(device))
            assert says in str(caught.value) and torch.get_float32_matmul_precision() == before
        else:
            use_precision(name, torch.device(device))
            assert torch.get_float32_matmul_precision() == ("high" if name == "tf32" else before)
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_are_in_bfloat16() -> None:
    for name, dtype in (("32", torch.float32), ("bf16", torch.bfloat16)):
        with use_precision(name, torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
