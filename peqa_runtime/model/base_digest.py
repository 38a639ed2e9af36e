"""`base_digest`: what makes two bases the same, whatever their packing, file dtype or sharding.

Canonical form, hashed with SHA-256:

    peqa-base 1\\n
    one line per entry, sorted: a JSON array and \\n, where an entry is
      ["linear", name, N, K, bits, G, h]    h = SHA-256 of the codes as bytes [N, K], then the zeros [N, G], then the
                                            scales [N, G], both little-endian fp32
      ["float", name, [shape], h]           h = SHA-256 of the values as little-endian fp32 (norms, biases, linears
                                            that stay floats)

The embedding table and the output head are not part of it: they carry no task scales, and how finely they are stored
is a choice that must not part a base from its scale sets. The two levels let entries be hashed in any order.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight


class BaseDigest:
    """Collects the lines of `digest_linear` and `digest_float`, in any order."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        """Add one entry."""
        self._lines.append(line)

    def hexdigest(self) -> str:
        """The digest of all entries added, 64 hexadecimal digits."""
        return hashlib.sha256(("peqa-base 1\n" + "".join(sorted(self._lines))).encode()).hexdigest()


def digest_linear(name: str, weight: QuantizedWeight) -> str:
    """The line of a quantized linear."""
    inner = hashlib.sha256()
    step = max(1, (1 << 22) // weight.in_features)  # unpacked codes stay within the cache
    for rows in weight.qweight.split(step):
        inner.update(unpack_codes(rows, weight.bits, weight.in_features).numpy().data)
    for values in (weight.zeros, weight.scales):
        inner.update(_fp32(values))
    shape = [weight.out_features, weight.in_features, weight.bits, weight.groups]
    return json.dumps(["linear", name, *shape, inner.hexdigest()]) + "\n"


def digest_float(name: str, tensor: Tensor) -> str:
    """The line of a tensor that is not quantized."""
    return json.dumps(["float", name, list(tensor.shape), hashlib.sha256(_fp32(tensor)).hexdigest()]) + "\n"


def _fp32(tensor: Tensor) -> memoryview:
    values = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy()
    return values.astype("<f4", copy=False).data.cast("B")
