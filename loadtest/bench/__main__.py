"""`python -m peqa_loadtest.bench`."""

from peqa_loadtest.bench.cli import main

raise SystemExit(main())
