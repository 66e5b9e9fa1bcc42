import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from randlora_pl.run.callbacks import PeakMemory
from randlora_pl.run.callbacks.progress import peak_bytes
from tests.run.callbacks.conftest import Fit


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the resident set, from Linux's /proc")
def test_peak_of_the_host_is_the_largest_resident_set() -> None:
    before = peak_bytes(torch.device("cpu"))
    here = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    block = torch.ones((before - here + 2**26) // 4)  # float32: 64 MiB above the peak so far
    after = peak_bytes(torch.device("cpu"))
    assert block.numel() and before + 2**25 <= after <= before + 2**27
    assert after == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_peak_is_logged_and_goes_on_across_a_resume(fit: Fit) -> None:
    callback = PeakMemory()
    trainer, _, _ = fit(callback)
    assert 1 < float(trainer.logged_metrics["memory/peak_mb"]) <= callback.peak / 1e6 * 1.001
    resumed = PeakMemory()
    resumed.load_state_dict({"peak": 10**15})
    assert resumed.peak == 10**15


def test_a_run_may_log_no_step() -> None:
    logged: list[float] = []
    module = SimpleNamespace(device=torch.device("cpu"), log=lambda name, value, **_: logged.append(float(value)))
    callback = PeakMemory()
    for step in range(3):
        callback.on_train_batch_end(SimpleNamespace(global_step=step, log_every_n_steps=0), module)  # type: ignore[arg-type]
    assert len(set(logged)) == 1 and logged[0] > 0
