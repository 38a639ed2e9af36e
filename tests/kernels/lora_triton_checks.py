"""The bench's LoRA rival, Triton against gathered: TRITON_INTERPRET=1 python lora_triton_checks.py cpu."""

from __future__ import annotations

import sys

import torch

from peqa_kernels.bench.lora import LoraSets
from peqa_kernels.bench.weights import Shape

if __name__ == "__main__":
    torch.manual_seed(0)
    where = torch.device(sys.argv[1])
    for segments, k, rows in (((256, 512, 64), 600, 5), ((512,), 256, 2)):
        sets = LoraSets(Shape(segments, k), 4, 16, where, torch.float16)
        x = torch.randn(rows, k, device=where).half()
        row = torch.tensor([2, 0, 3, 3, 1][:rows], dtype=torch.int32, device=where)
        gathered = torch.randn(rows, sum(segments), device=where).half()
        fused = gathered.clone()
        assert sets.fits_blocks
        sets.add_gathered(gathered, x, row)
        sets.add_fused(fused, x, row)
        torch.testing.assert_close(fused, gathered, rtol=2e-3, atol=2e-3)
    print("equal")
