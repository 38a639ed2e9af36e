"""Measure tiles on this machine's GPU and write its table:

    python -m peqa_kernels.quant_matmul.cli --shapes 12288x4096,22016x4096 --bits 4 --group -1 --rows 1,16,32,64,2048

Random codes; a launch is timed within a CUDA graph that walks through copies of the weight, past the caches. Each
tile must have computed exactly. Minutes for each shape: every candidate is compiled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul import QuantizedWeight, prepare
from peqa_kernels.quant_matmul.tuning import TABLES, Scales, TileTable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 where there is no CUDA device."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("tiles are measured on a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    from peqa_kernels.quant_matmul.gpu_tune import tune

    name = torch.cuda.get_device_name()
    table = TileTable.load(name, options.folder)
    for shape in options.shapes.split(","):
        n, k = (int(size) for size in shape.split("x"))
        prepared = prepare(random_weight(n, k, options.bits, options.group, "cuda"))
        for rows in options.rows.split(","):
            for scales in options.scales.split(","):
                line = tune(prepared, int(rows), getattr(torch, options.dtype), scales)
                print(line, flush=True)
                table = table.with_line(line)
                table.save(name, options.folder)
    return 0


def random_weight(n: int, k: int, bits: int, group: int, device: str) -> QuantizedWeight:
    """Codes of every value, integer zero points; `group` -1 is one scale per output."""
    groups = 1 if group == -1 else k // group
    return QuantizedWeight(
        torch.randint(0, 256, (n, packed_width(k, bits)), dtype=torch.uint8, device=device),
        torch.rand((n, groups), device=device).half().float() / 64,
        torch.randint(0, 1 << bits, (n, groups), device=device).float(),
        bits,
        k,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure tiles of the Triton kernel and write this GPU's table."
    )
    parser.add_argument("--shapes", required=True, help="outputs x inputs, for example 12288x4096,22016x4096")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=-1, help="inputs per scale; -1: one scale per output")
    parser.add_argument("--rows", default="1,16,32,64,512,2048", help="sizes of batches")
    parser.add_argument("--scales", default="channel", help=f"task scales, of {', '.join(get_args(Scales))}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--folder", type=Path, default=TABLES, help="where the tables are")
    return parser


if __name__ == "__main__":
    sys.exit(main())
