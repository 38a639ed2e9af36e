"""The verbs of `peqa` beside `serve`."""
