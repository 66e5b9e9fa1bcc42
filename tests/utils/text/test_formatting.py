from randlora_pl.utils.text import duration


def test_what_is_long_is_told_less_exactly() -> None:
    told = {
        0.4: "0 s", 89: "89 s", 90: "2 min", 3_540: "59 min", 3_590: "1 h 00 min", 7_500: "2 h 05 min",
        35_940: "9 h 59 min", 36_000: "10 h", 250_000: "69 h", 259_200: "3 days", 1_332_617 * 3_600: "55,526 days",
    }  # fmt: skip
    assert {seconds: duration(seconds) for seconds in told} == told
    assert duration(1.26, 1) == "1.3 s" and duration(126, 1) == "2 min"
