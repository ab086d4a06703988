"""``python -m paci_rt`` is ``paci-rt``."""

from __future__ import annotations

import sys

from paci_rt.cli import main

if __name__ == "__main__":
    sys.exit(main())
