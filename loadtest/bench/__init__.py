"""The engine under load, as the outside sees it: real `peqa serve` processes, loaded over HTTP, with bars.

    python -m peqa_loadtest.bench [--out FILE]       all of it, the offline half (`python -m peqa_runtime.bench`) first

Like all of this package it imports nothing of the server: it starts commands, speaks HTTP and reads /proc.
figure: a measured figure and its bar. process: a server that is started, watched and ended. offline: the other half,
a command too. session: loads on one server. throughput, updates, disconnects, endurance, shutdown, many_tasks,
gpu_load: what is shown.
"""
