"""`python -m swiftkernels`: the command line where no script was installed."""

import sys

from swiftkernels.tools.cli import main

sys.exit(main())
