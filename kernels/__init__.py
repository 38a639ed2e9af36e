"""Floor 0: packing, quantized matmul, paged attention and what stands between; no model, server or task name.

Stays import-light on purpose: the folder is called `kernels`, a name that transformers also looks for. It must
import neither triton nor transformers and must not define a module version.
"""
