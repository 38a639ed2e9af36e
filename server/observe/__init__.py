"""What the server says of itself: log lines, metrics, traces, health."""
