"""``python -m randlora_pl`` is the same as ``randlora-pl``."""

import sys

from randlora_pl.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
