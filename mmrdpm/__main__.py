"""`python -m mmrdpm` is the command line."""

import sys

from mmrdpm.cli import main

sys.exit(main())
