"""Every link of the pages leads somewhere, to the heading that it names."""

from tests.docs.pages import DOCS, PAGES, ROOT, anchors_of, links_of
from tests.support.products import in_one_item


@in_one_item("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link in links_of(PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{link}: on GitHub, too"
        if anchor and target.suffix == ".md":  # Material chooses pictures by `#only-light` and `#only-dark`
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_the_pages_link_to_each_other_only() -> None:
    """A link out of docs/ would be dead on the site."""
    for page, text in PAGES.items():
        for link in links_of(text) if page.startswith("docs/") else ():
            path = link.partition("#")[0]
            assert link.startswith("https://") or (ROOT / page).parent.joinpath(path).resolve().is_relative_to(DOCS), (
                link
            )


def test_links_are_found() -> None:
    text = "# A b: c\n[x](method.md#a-b) `[y](z)`\n```text\n# not a heading\n[n](m)\n```\n## D\n"
    assert links_of(text) == ["method.md#a-b"] and anchors_of(text) == {"a-b-c", "d"}
    assert sum(len(links_of(page)) for page in PAGES.values()) > 50
