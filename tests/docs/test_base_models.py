"""The page of base models agrees with the catalogs, with the counts of memory, and with the tests that checked them."""

import re

import yaml

from randlora_pl.language.catalog import KNOWN
from randlora_pl.models import MODELS
from randlora_pl.models.catalog import matrix
from randlora_pl.run.options.shipped import config_names
from tests.docs.pages import PAGES
from tests.models.test_current_models import LOCAL_TOKENIZER, OWN_TOKENIZER
from tests.models.test_true_shapes import TRUE
from tests.run.test_lightning_cli import COUNTS

PAGE = PAGES["docs/base_models.md"]
TEXTS = {"qwen3_0.6b": KNOWN["Qwen/Qwen3-0.6B"], "smollm2_135m": KNOWN["smollm2"]}
IMAGES = {row.config: row for row in MODELS if re.match(r"siglip2|pe_core|metaclip2|mobileclip2|dinov3", row.config)}


def rows_of(heading: str) -> dict[str, list[str]]:
    """The cells of the table below a heading by its first column."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_facts_are_those_of_the_catalogs() -> None:
    facts = rows_of("Facts")
    assert facts.keys() == {*IMAGES, *TEXTS}
    for config, row in IMAGES.items():
        name, parameters, pixels, _, license = facts[config]
        assert (name, parameters, license) == (row.name, f"{row.parameters:,}", row.license)
        assert pixels == str(row.image_size)
    for config, known in TEXTS.items():
        name, parameters, _, _, license = facts[config]
        assert KNOWN[name] is known and (parameters, license) == (f"{known.parameters:,}", known.license)


def test_configs_are_bundled_and_use_these_models() -> None:
    prefixes = "clip|dinov|siglip|pe_|metaclip|mobileclip|qwen|smollm2_"
    configs = set(re.findall(rf"`((?:{prefixes})[\w.]+)`", PAGE))
    assert configs >= {*IMAGES, *TEXTS} and configs <= config_names().keys()
    for config, row in IMAGES.items():
        options = yaml.safe_load(config_names()[config].read_text())["model"]["init_args"]
        tag = "" if row.library == "open_clip" else f".{row.tags[0]}"
        assert options["name"] == row.name + tag
        assert options["pretrained"] == (row.tags[0] if row.library == "open_clip" else "timm")


def test_memory_is_counted_as_the_page_says() -> None:
    memory = rows_of("Memory")
    assert memory.keys() == {*IMAGES, *TEXTS}
    for config, (trained, adapter, full) in memory.items():
        known = (IMAGES | TEXTS)[config].parameters
        count = int(trained.replace(",", ""))
        head = config_names()[config].read_text()
        assert COUNTS.get(config, count) == count and f"Cost: {trained} trained parameters" in head
        assert adapter == f"{(2 * known + 16 * count) / 1e9:.2f}" and full == f"{16 * known / 1e9:.2f}"
    smallest = (4 * TEXTS["smollm2_135m"].parameters + 16 * 4_072_320) / 1e9
    assert f"where a frozen parameter takes 4 bytes: {smallest:.2f} GB" in " ".join(PAGE.split())


def test_checks_are_those_of_the_tests() -> None:
    items = PAGE.partition("\n## What was checked\n")[2].partition("\n## ")[0].split("\n- **")[1:]
    _, trained, outputs = (set(re.findall(r"`(.*?)`", item)) for item in items)
    assert trained == {*LOCAL_TOKENIZER, *OWN_TOKENIZER, *TEXTS}
    assert outputs == {config for config, row in IMAGES.items() if row.name in TRUE}
    prepared = {row["name"]: row for row in matrix()}
    assert all(prepared[row.name]["equal"] == prepared[row.name]["tags"] == "1" for row in IMAGES.values())


def test_every_license_has_a_date_and_a_link() -> None:
    licenses = rows_of("Licenses")
    assert len(licenses) == 7 and "Read on 30 November 2026" in PAGE
    for name, (_, use, source) in licenses.items():
        assert "](https://" in source, name
        forbids = any(word in name for word in ("MetaCLIP2", "MobileCLIP2"))
        assert ("forbidden" in use) == forbids
    for config, row in IMAGES.items():
        comments = config_names()[config].read_text()
        assert row.license == "Apache-2.0" or "license" in comments, "a config says where a license is no free one"
