"""Metadata of the package that depends on where its owner publishes it: one setting of pyproject.toml."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ALT = r'<(?:picture|p)>(?:(?!</p)[\s\S])*?<img [^>]*?alt="([^"]*)"[^>]*>\s*</(?:picture|p)>'
"""A picture in HTML, with its text."""
ELSEWHERE = r"[a-z]+:|#"
"""The start of an address that is right on every page."""


def readme(text: str, repository: str, tag: str) -> str:
    """Return the README for a page of a package index, on which a path of the repository leads nowhere.

    Args:
        text: The README of the repository.
        repository: Address of the repository. If it is empty, links and pictures become their texts.
        tag: Tag of the release, whose files the links show.
    """
    if not repository:
        text = re.sub(ALT, r"*\1*", text)
        text = re.sub(rf"!?\[([^\]]*)\]\((?!{ELSEWHERE})[^)\s]+\)", r"\1", text)
        return f"{text.rstrip()}\n\nThe guides are in the folder `docs` of the source distribution.\n"
    text = re.sub(rf'\b(src|srcset)="(?!{ELSEWHERE})', rf'\1="{repository}/raw/{tag}/', text)
    text = re.sub(rf"(!\[[^\]]*\]\()(?!{ELSEWHERE})", rf"\1{repository}/raw/{tag}/", text)
    text = re.sub(rf"((?<!!)\[[^\]]*\]\()(?!{ELSEWHERE})", rf"\1{repository}/blob/{tag}/", text)
    clone = f"git clone --branch {tag} {repository} randlora-pl\ncd randlora-pl\n"
    text = re.sub(r'```sh\n(?=.*"\.\[test\]")', rf"\g<0>{clone}", text)
    text = re.sub(r" in the checkout\b", "", text).replace("--data.root docs/ferry", "--data.root CHATS")
    return re.sub(r'pip install ("?)\.(?!\[test)(?=[\s`\[])', r"pip install \1randlora-pl", text)


class CustomMetadataHook(MetadataHookInterface):
    """Sets the README and, if the owner has named a repository, the addresses of the project."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the fields that pyproject.toml leaves to the build."""
        repository, tag = self.config["repository"].rstrip("/"), f"v{metadata['version']}"
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": readme(text, repository, tag)}
        pages = {
            "Repository": "",
            "Documentation": f"/blob/{tag}/docs/index.md",
            "Changelog": f"/blob/{tag}/CHANGELOG.md",
            "Issues": "/issues",
        }
        metadata["urls"] = {name: repository + page for name, page in pages.items() if repository}
