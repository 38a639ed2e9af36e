"""`python -m peqa_kernels.bench`."""

from peqa_kernels.bench.cli import main

raise SystemExit(main())
