"""Here kernels run on the chip, not in Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # pytest reads this after the other tests' conftest, before any test's imports
