"""`python -m pgcdp`: the same as the program `pgcdp`, but it waits for its threads, as the agent must."""

import sys

from pgcdp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
