"""Mixes of `channel` sets: out_scale = the sum of share x out_scale, in float32. The base's scales are ones.

As the scale is a factor of the row, the mix of the scales is the mix of the tuned weights: exact, not an
approximation of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from peqa_runtime.core import BASE_REVISION
from peqa_runtime.scales.scale_set import ScaleSet

Shares = Sequence[tuple[str, float]]
"""(revision, share); the base's revision is the empty one."""


def blend_revision(shares: Shares) -> str:
    """Return the revision of a mix: SHA-256 (hex) over the sorted (revision, share) pairs, shares bit for bit."""
    digest = hashlib.sha256(b"peqa-blend\n")
    for revision, share in sorted(shares):
        digest.update(f"{revision or 'base'} {share.hex()}\n".encode())
    return digest.hexdigest()


def mix(shares: Shares, sets: Sequence[ScaleSet | None]) -> ScaleSet:
    """Return the mix of `sets` (None: the base) as a set of kind "channel"; at least one is not the base.

    Added up in the order of the revision's pairs, so that one revision is always the same bits, and a share of 1
    gives the set's own.
    """
    ordered = sorted(zip(shares, sets, strict=True), key=lambda item: item[0])
    like = next(scale_set for scale_set in sets if scale_set is not None)
    flat = torch.zeros(like.flat.shape, dtype=torch.float32)
    for (revision, share), scale_set in ordered:
        if scale_set is None:
            assert revision == BASE_REVISION
            flat += share
        else:
            assert scale_set.layout is like.layout
            flat.add_(scale_set.flat.float(), alpha=share)
    return ScaleSet("channel", like.base_digest, flat, like.layout, blend_revision(shares))
