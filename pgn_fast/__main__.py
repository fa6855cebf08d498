"""``python -m pgn_fast`` is ``pgn-fast``."""

import sys

from .cli import main

sys.exit(main())
