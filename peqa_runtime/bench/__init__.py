"""What the engine does under load, measured offline, beside the speed that this machine has today.

    python -m peqa_runtime.bench [BASE] [--out FILE]       BASE: a base folder; default: the demo's

workload: prompts, scale sets and loads, all drawn from a seed. machine: the speed of the day. throughput: mixed tasks
against the base, and many streams. equality: the same answer whatever the neighbours. profile: where a step's time
goes.
The served half, over HTTP, is `python -m peqa_loadtest.bench`; `make bench-engine` runs both.
"""
