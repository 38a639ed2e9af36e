"""Whether matrix tiles compute here what other instructions compute: few machines have them, and some emulate them."""

from __future__ import annotations

import torch

from peqa_kernels.native.ops import NativeOps
from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight

ROWS, OUTPUTS, INPUTS = 17, 96, 320  # two stripes of rows, whole tiles and part of one


def tiles_agree(ops: NativeOps, other: NativeOps | None) -> bool:
    """True when `ops` gives the very bits that `other` gives, for groups that fill a tile and for such as do not.

    False also where there is no `other` to compare with.
    """
    if other is None:
        return False
    generator = torch.Generator().manual_seed(0)
    for bits, group in ((4, 32), (4, 64), (8, INPUTS)):
        codes = torch.randint(0, 1 << bits, (OUTPUTS, INPUTS), dtype=torch.uint8, generator=generator)
        shape = (OUTPUTS, INPUTS // group)
        scales = torch.rand(shape, generator=generator) + 0.5
        zeros = torch.rand(shape, generator=generator) * (1 << bits)
        weight = QuantizedWeight(pack_codes(codes, bits), scales, zeros, bits, INPUTS)
        x = torch.randn(ROWS, INPUTS, generator=generator)
        packed = [o.pack(weight) for o in (ops, other)]
        for activation_bits in (16, 8):
            results = []
            for o, p in zip((ops, other), packed, strict=True):
                p.set_activation_bits(activation_bits)
                results.append(o.quant_matmul(x, p, None, None, None, None, None, None))
            if not torch.equal(*results):
                return False
    return True
