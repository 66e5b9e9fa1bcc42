"""At saturation every request is answered rightly, and memory stays where it is."""

from pathlib import Path

import pytest

from tests.serving.load import hammer
from tests.serving.server import Running


@pytest.mark.slow
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
        for pid, command in server.family().items():
            for which, what in enumerate(("RSS", "USS")):
                early, late = (
                    sorted(sample[pid][which] for sample in part)[third // 2]
                    for part in (load.memory[:third], load.memory[-third:])
                )
                print(f"{what} {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB of {command[-50:]}")
                # In the 40 seconds between, some 8,000 requests, a leak of 1 kB a request would add 8 MB.
                assert late - early < 4e6, (command, what, early, late)
        assert server.end() == 143
        assert "Traceback" not in server.log.read_text()
    finally:
        server.kill()
