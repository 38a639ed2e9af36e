"""What the kernels cost, beside the rates of memory and arithmetic that the same run measures.

    python -m peqa_kernels.bench [--out FILE]        needs torch, and triton on a GPU; no model, no other package
    make bench-kernels SETUP=0 ARGS="--device cuda"  the same on a GPU alone, with what this Python has: no network

row: one measured figure and its bar. report: table and JSON. timing: medians of interleaved repetitions (CPU) or of
replayed CUDA graphs (GPU). machine: rates of this machine. weights: random weights, rotated past the caches, and the
forms that other kernels want them in. cpu, gpu, attention: what is measured. lora: adapters the way multi-LoRA servers
run them.
"""
