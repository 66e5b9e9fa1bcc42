import pytest

import randlora_pl.models


def test_every_public_name_resolves() -> None:
    for name in randlora_pl.models.__all__:
        assert getattr(randlora_pl.models, name) is not None


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = randlora_pl.models.nothing  # type: ignore[attr-defined]
