"""``adapter export --to adapter``: our own format again, in another dtype or shape."""

import argparse
from pathlib import Path

from randlora_pl.utils.errors import UserError


def export(options: argparse.Namespace) -> int:
    """Writes the adapter once more."""
    from randlora_pl.adapters.io.save_load import DTYPES, copy_adapter

    try:
        size = copy_adapter(options.adapter, options.output, DTYPES.get(options.dtype))
    except OSError as error:
        if Path(str(error.filename)).is_relative_to(options.adapter):  # which cannot be read
            raise
        raise UserError(
            f"{options.output} cannot be written ({error.strerror or error}); name another --output."
        ) from None
    print(f"{options.output}: {size:,} bytes")
    return 0
