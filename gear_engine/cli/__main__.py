"""``python -m gear_engine.cli``, which is also what ``torchrun -m`` and ``accelerate launch -m`` take."""

from __future__ import annotations

import sys

from gear_engine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
