"""Other people's quantized checkpoints into base folders, codes kept bit for bit."""
