"""Scale sets: the value, where it rests (disk), where it lives (device) and who may use it (policy)."""
