"""The routes of tasks, and an upload's way to a file."""
