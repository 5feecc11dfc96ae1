"""`python -m randbatch`."""

import sys

from randbatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
