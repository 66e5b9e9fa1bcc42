from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.utils.text import MOST_PACKED, packed, unpacked
from tests.support.products import in_one_item


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_values_come_back(values: list[bool]) -> None:
    back = unpacked(packed(values))
    assert back is not None and back.tolist() == values


@in_one_item(
    "damaged", [None, 7, "", "8", "8:", "9:/w==", "-1:/w==", "x:/w==", "8:/w", "8:é", f"{10 * MOST_PACKED}:AA=="]
)
def test_damaged_text_is_nothing(damaged: object) -> None:
    assert unpacked(damaged) is None
