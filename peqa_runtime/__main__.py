"""`python -m peqa_runtime`: the offline verbs without the server."""

from peqa_runtime.cli import main

main()
