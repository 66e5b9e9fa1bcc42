import resource

import torch

from randlora_pl.callbacks import PeakMemory
from randlora_pl.callbacks.memory import peak_bytes
from tests.callbacks.conftest import Fit


def test_peak_of_the_host_is_the_largest_resident_set() -> None:
    before = peak_bytes(torch.device("cpu"))
    block = torch.ones(before // 4 + 16_000_000)  # float32: larger than everything so far
    after = peak_bytes(torch.device("cpu"))
    assert after >= before + block.numel() * 4 // 2
    assert after == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_peak_is_logged_and_goes_on_across_a_resume(fit: Fit) -> None:
    callback = PeakMemory()
    trainer, _, _ = fit(callback)
    assert 0 < float(trainer.logged_metrics["memory/peak_bytes"]) <= callback.peak * 1.001
    resumed = PeakMemory()
    resumed.load_state_dict({"peak": 10**15})
    assert resumed.peak == 10**15
