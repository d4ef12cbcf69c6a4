"""`python -m autotune`."""

import sys

from .cli import main

sys.exit(main())
