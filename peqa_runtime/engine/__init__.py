"""The engine: block_manager and scheduler decide (no torch), model_runner and sampler compute, engine ties them."""
