"""The offline verbs of the `peqa` command, one a file; `peqa_runtime.cli` puts them together."""
