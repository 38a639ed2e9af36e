"""Function calls: what a chat may call, how the model is told, and finding the calls in what it writes."""
