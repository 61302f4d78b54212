"""Several test processes share the machine: each computes on one thread, and so do the processes that it starts."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
