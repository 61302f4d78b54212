"""What a launcher such as torchrun says of this process in its environment. Nothing here imports
torch.
"""

from __future__ import annotations

import os

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Where the processes of a group meet: set by whoever starts a group, and by nobody else."""


def rank() -> int:
    """This process's number in the group that a launcher started; 0 where it stands alone.

    A scheduler may set RANK for purposes of its own: it counts only beside WORLD_SIZE > 1 and a
    place to meet.
    """
    try:
        number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 0
    together = size > 1 and 0 <= number < size and all(os.environ.get(name) for name in MEETING)
    return number if together else 0
