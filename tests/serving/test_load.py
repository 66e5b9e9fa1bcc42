"""At saturation every request is answered rightly, and memory stays where it is."""

from pathlib import Path

import pytest

from tests.serving.load import hammer
from tests.serving.server import Running


def test_three_seconds_at_saturation(server: Running) -> None:
    load = hammer(server, 3, 8, 1)
    assert not load.wrong, load.wrong[:5]
    assert len(load.seconds) >= 20
    print(load)


@pytest.mark.slow
def test_a_minute_at_saturation(adapter: Path, tmp_path: Path) -> None:
    server = Running(adapter, tmp_path / "log").wait()
    try:
        hammer(server, 20, 16)  # caches and allocators fill
        family = server.family().keys()
        load = hammer(server, 60, 16)
        print(load)
        assert not load.wrong, load.wrong[:5]
        assert len(load.seconds) >= 1000
        assert server.family().keys() == family  # no process was lost or added
        third = len(load.memory) // 3
        for pid in family:
            early = sorted(sample[pid] for sample in load.memory[:third])[third // 2]
            late = sorted(sample[pid] for sample in load.memory[-third:])[third // 2]
            print(f"{server.family()[pid][-40:]}: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
            # A leak of 1 kB a request would add 2 MB or more in the 40 seconds between.
            assert late - early < 2e6, (pid, early, late)
        assert server.end() == 143
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
