"""From float weights to frozen integers: rounding, GPTQ, block-wise training, and what they need of a model.

`peqa_runtime.model.quantize` puts them together.
"""
