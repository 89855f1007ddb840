"""`python -m lmlib` is the command `lmlib`; see lmlib/cli/parser.py."""

import sys

from lmlib.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
