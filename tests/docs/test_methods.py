"""The table of methods and the README name every method, in the groups that `adapters` prints."""

import re

from randlora_pl.run.options.classes import classes
from tests.docs.pages import PAGES

GROUPS = {
    "fixed rank": ("Fixed rank", "fixed rank"),
    "full rank": ("Full rank", "full rank ([all methods](docs/methods/index.md))"),
    "whole": ("The whole model", "the whole model"),
    "optimizer": ("Optimizers", "the whole model, by an optimizer with less memory"),
}
"""Heading on the page of methods and row of the README, by group."""


def named(text: str) -> set[str]:
    return {re.sub("[^a-z]", "", name.lower()) for name in text.split(",")}


def test_every_method_is_in_its_group() -> None:
    groups = {name: getattr(kind, "group", "") for name, kind in classes("model.adapter").items()}
    assert set(groups.values()) == GROUPS.keys()
    for group, (heading, row) in GROUPS.items():
        methods = {name.lower() for name, own in groups.items() if own == group}
        section = PAGES["docs/methods/index.md"].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| \[[^]]*\]\((\w+)\.md\)", section, flags=re.M)) == methods
        (names,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", PAGES["README.md"], flags=re.M)
        assert named(names) == methods - {"frozen"}
    counted = len(groups) - 1  # `Frozen` updates nothing: it is the adapter beside learned prompts
    assert f"| methods, community | {counted}, small |" in PAGES["README.md"]
    assert f"| Methods | [{counted}](methods/index.md)" in PAGES["docs/compared_with_peft.md"]
