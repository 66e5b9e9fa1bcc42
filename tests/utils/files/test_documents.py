import json
import sys
from itertools import count

import pytest
import yaml

from randlora_pl.utils.files import DEEPEST, LARGEST, parse_json, parse_yaml
from tests.support.products import in_one_item

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k0: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


def test_json_is_refused_with_one_kind_of_error() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    for text in ('{"a":' + "[" * 100_000, "[" * 101 + "]" * 101, "{", b"\xff", "1" * 5000, "[1" + "0" * 400 + "]", ""):
        with pytest.raises(ValueError):
            parse_json(text)


@in_one_item(
    ("text", "word"),
    [
        (BOMB, "aliases"),
        ("a: &a " + "x" * 10_000 + "\nb: [" + "*a," * 30 + "]", "aliases"),
        ("a: &a [*a]", "itself"),
        ("a: &a {b: {c: *a}}", "itself"),
        ("[" * LARGEST, "nested"),
        ("{a: " * 3000, "nested"),
        ("[" * 101 + "]" * 101, "nested"),
        ("\n".join(" " * depth + "a:" for depth in range(400)), "nested"),
        ("a: " + "1" * 5000, "digits"),
        ("a: 0x" + "f" * 5000, "digits"),
        ("a: " + "1:1" * 2000, "digits"),
        ("a: x\n" * (LARGEST // 5 + 1), "characters"),
        ("a: !!bool maybe", "KeyError"),
        ("a: !!timestamp 2026-01-02", "constructor"),
        ("a: !!set {b}", "constructor"),
        ("a: !!binary aGk=", "constructor"),
        ("a: !!omap [b: 1]", "constructor"),
        ("a: b\x07", r"U\+0007"),
        ("a: !!int ''", "Error"),
        ("? [a]\n: b", "unhashable"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("a: 1\na: 2", "duplicate"),
    ],
)
def test_yaml_is_refused_with_one_kind_of_error_and_at_once(text: str, word: str) -> None:
    calls = count()
    sys.setprofile(lambda *_: next(calls))
    try:
        with pytest.raises(yaml.YAMLError, match=word):
            parse_yaml(text)
    finally:
        sys.setprofile(None)
    assert next(calls) < 1_000_000, "calls and returns of functions"


def test_what_people_write_in_yaml_is_read() -> None:
    text = "lr: 1e-3\ndate: 2026-01-02\nx: &x {a: [1, 2], b: .5}\ny: {<<: *x, b: 2}\nz: [*x, *x]\n"
    found = parse_yaml(text)
    assert found["lr"] == 1e-3 and found["date"] == "2026-01-02" and found["y"] == {"a": [1, 2], "b": 2}
    assert parse_yaml(MERGES)["h"] == {"k0": 1}
    assert parse_yaml("") is None and parse_yaml(json.dumps({"a": {"b": [None, True]}})) == {"a": {"b": [None, True]}}
