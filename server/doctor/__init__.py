"""`peqa doctor`: what a server finds on this machine, and what to do about what stands in its way.

Each check is small, reads only, and ends in time; what could crash or hang runs in a process of its own.
"""
