"""The suite stays small: what runs by default is counted."""

import pytest


def test_at_most_4000_items_run_by_default(request: pytest.FixtureRequest) -> None:
    config = request.config
    if config.getoption("markexpr") not in config.getini("addopts"):
        pytest.skip("another part of the suite was asked for")
    assert len(request.session.items) <= 4000, "see CONTRIBUTING.md"
