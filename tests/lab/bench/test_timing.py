import pytest

from randlora_pl.lab.bench import Spread, in_turns, machine, processor, ratios


def test_cases_are_measured_in_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []
    numbers = iter(range(100))

    def case(name: str) -> float:
        order.append(name)
        return next(numbers)

    figures = in_turns({"a": lambda: case("a"), "b": lambda: case("b")}, 2)
    assert order == [*"ab", *"ab", *"ba"]
    assert figures == {"a": [2, 5], "b": [3, 4]}


def test_ratios_are_taken_round_by_round() -> None:
    spread = ratios([2.0, 40.0, 9.0], [1.0, 10.0, 3.0])
    assert (spread.median, spread.low, spread.high) == (3, 2, 4)
    assert f"{spread:.1f}" == "3.0 (2.0 .. 4.0)"
    assert Spread.over([1.0]) == Spread(1.0, 1.0, 1.0)


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    facts = machine()
    assert facts["cores"] >= 1 and facts["processor"] and facts["torch"]
    assert list(facts) == ["processor", "cores", "threads", "torch", "gpu", "python"]
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert processor()


def test_figures_are_handed_over_after_every_round_that_counts() -> None:
    seen: list[dict[str, list[float]]] = []
    numbers = iter(range(100))
    in_turns({"a": lambda: float(next(numbers))}, 2, warm_up=False, after_round=seen.append)
    assert seen == [{"a": [0.0]}, {"a": [0.0, 1.0]}]


def test_every_other_round_goes_backwards() -> None:
    order: list[str] = []
    cases = {name: (lambda name=name: order.append(name) or 0.0) for name in "ab"}
    assert in_turns(cases, 3, warm_up=False) == {"a": [0.0] * 3, "b": [0.0] * 3}
    assert "".join(order) == "abbaab"
