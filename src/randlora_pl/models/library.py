"""Library of a model name."""

from typing import Literal

from randlora_pl.models.folders.model_folder import is_folder, open_folder
from randlora_pl.utils.errors import UserError, near


def library_of(name: str) -> Literal["open_clip", "timm"]:
    """Return the library of a model name.

    The name is ``tiny``, one of open_clip or timm (also with a tag after a dot), ``local-dir:PATH`` or
    ``hf-hub:ORG/NAME``.

    Raises:
        UserError: The name is in neither library.
    """
    if is_folder(name):
        return open_folder(name).library
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
