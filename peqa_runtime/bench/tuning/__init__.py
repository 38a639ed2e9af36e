"""Quality and cost of tuned scale sets against LoRA, on public data: `make bench-tuning DATA=DIR`."""
