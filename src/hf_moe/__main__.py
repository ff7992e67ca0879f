"""The command line, as `python -m hf_moe`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
