"""`python -m peqa_kernels.bench`."""

import signal
import sys

from peqa_kernels.bench.cli import main

# A run that is told to end still prints and writes what it has measured.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
raise SystemExit(main())
