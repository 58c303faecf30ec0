"""`python -m logitproc.cli`, for launchers of several processes."""

import sys

from . import main

sys.exit(main())
