"""`python -m pgcdp`: the same as the program `pgcdp`."""

import sys

from pgcdp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
