import pytest
import torch

from randlora_pl.utils.device import choose_as_on_cuda, on_cuda


def test_implementations_for_cuda_are_chosen_elsewhere_inside_the_block_only() -> None:
    tensor = torch.zeros(1)
    assert not on_cuda(tensor)
    with pytest.raises(ZeroDivisionError), choose_as_on_cuda():
        with choose_as_on_cuda():
            assert on_cuda(tensor)
        assert on_cuda(tensor)
        raise ZeroDivisionError
    assert not on_cuda(tensor)
