"""`python -m deepclust.cli COMMAND ...`, for where the script `deepclust` is not on the path."""

import sys

from deepclust.cli import main

sys.exit(main())
