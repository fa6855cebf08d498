"""``python -m pgn_fast.cli`` is ``pgn-fast``."""

import sys

from . import main

sys.exit(main())
