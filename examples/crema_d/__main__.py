"""Start of the program: `python examples/crema_d` or `torchrun ... examples/crema_d`."""

import sys
from pathlib import Path

if not __package__:  # started by its path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crema_d.cli import main

if __name__ == "__main__":
    sys.exit(main())
