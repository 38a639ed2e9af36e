"""Load test for OpenAI-style completion servers that serve many tasks. Speaks HTTP only; imports nothing of ours.

workload: which request, which prompt, when. client: one request, timed. run: many at once. swap: a task that changes
meanwhile. report: percentiles, table, JSON. cli: the `peqa-loadtest` command.
"""
