"""``data show``: a contact sheet of a dataset's images."""

from pathlib import Path
from typing import Annotated

from randlora_pl.commands.common.arguments import check_output, check_parent
from randlora_pl.commands.data.report import checked_root
from randlora_pl.data.catalog.registry import DatasetSpec, how_to_get, present
from randlora_pl.language.dataset_facts import find_images
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.option_types import File, Root
from randlora_pl.utils.options import between
from randlora_pl.utils.text.formatting import printable


def show(name: str, *, root: Root = None, output: File | None = None, shots: Annotated[int, between(1, 50)] = 4) -> int:
    """Draw a contact sheet (PNG) of a dataset, with class names, split counts and prompts.

    Examples:
        randlora-pl data show digits

    Args:
        name: Dataset (randlora-pl datasets)
        output: New PNG file (default: contact-sheet-NAME.png, which is replaced)
        shots: Training images per class, as --data.shots N selects them with seed 0
    """
    row = find_images(name)
    file = _output(row, output)
    folder = checked_root(root, [row], "data show")
    if not present(row, folder):
        raise UserError(how_to_get(row, folder))
    from randlora_pl.data.contact_sheet import Sheet
    from randlora_pl.tasks.images import UsedPrompts
    from randlora_pl.tasks.vision_language import CAPTION

    sheet = Sheet.of(row, folder, shots)
    sheet.write(file)
    print(f"{row.name}: {row.title}")
    print(sheet.caption)
    if not row.captions:
        print(f"Prompts of VisionLanguageTask, the default: {UsedPrompts([CAPTION], [CAPTION]).summary()}")
    also = "" if row.captions else " of TextHeadTask, zeroshot and --model.eval_prompts ensemble"
    print(f"Prompts{also} ({len(sheet.prompts)}), here for the class {sheet.names[0]!r}:")
    for prompt in sheet.prompts:
        print(f"  {printable(prompt)}")
    print(f"\nContact sheet: {file}")
    return 0


def _output(row: DatasetSpec, named: Path | None) -> Path:
    """Return the file to write; a typed one must be new."""
    if named is None:
        return Path(f"contact-sheet-{row.name}.png")
    if named.suffix.lower() != ".png":
        raise UserError(f"--output is {named}: a contact sheet is a PNG file, for example {row.name}.png")
    check_output(named)
    check_parent(named)
    return named
