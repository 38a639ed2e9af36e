"""`python -m peqa_loadtest.bench`."""

import signal
import sys

from peqa_loadtest.bench.cli import main

# A run that is told to end still prints and writes what it has measured.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
raise SystemExit(main())
