"""`python -m peqa_runtime.bench`."""

from peqa_runtime.bench.cli import main

raise SystemExit(main())
