"""`python -m peqa_runtime.bench.tuning`."""

import sys

from peqa_runtime.bench.tuning.cli import main

sys.exit(main())
