"""python -m tricomp.cli: the same as the command."""

import sys

from tricomp.cli import main

if __name__ == "__main__":
    sys.exit(main())
