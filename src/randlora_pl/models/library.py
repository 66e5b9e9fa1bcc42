"""Which library a model name belongs to."""

from typing import Literal

from randlora_pl.utils.errors import UserError, near


def library_of(name: str) -> Literal["open_clip", "timm"]:
    """The library that knows a name; a tag after a dot belongs to timm's names.

    Args:
        name: ``tiny``, a name of ``open_clip.list_models()`` or of ``timm.list_models()``.

    Raises:
        UserError: Neither library knows it.
    """
    import open_clip
    import timm

    clips = ["tiny", *open_clip.list_models()]
    if name in clips or name.replace("/", "-") in clips:
        return "open_clip"
    base = name.partition(".")[0]
    vits = timm.list_models()
    if base in vits:
        return "timm"
    raise UserError(
        f"--model.name: neither open_clip nor timm has a model '{name}'.{near(base, [*clips, *vits])} "
        "`randlora-pl models` shows some."
    )
