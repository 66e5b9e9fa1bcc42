"""``adapter export --to adapter``: our own format again, in another dtype or shape."""

import argparse


def export(options: argparse.Namespace) -> int:
    """Write the adapter again."""
    from randlora_pl.adapters.io.save_load import DTYPES, copy_adapter

    size = copy_adapter(options.adapter, options.output, DTYPES.get(options.dtype))
    print(f"{options.output}: {size:,} bytes")
    return 0
