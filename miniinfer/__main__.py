"""`python -m miniinfer` is the command `miniinfer`."""

import sys

from miniinfer.cli import main

if __name__ == "__main__":
    sys.exit(main())
