"""Measure tiles on this machine's GPU and write its table:

    python -m peqa_kernels.quant_matmul.cli --shapes 12288x4096,22016x4096 --bits 4 --group -1 --rows 1,16,32,64,2048

Random codes; a launch is timed within a CUDA graph that walks through copies of the weight, past the caches. Each
tile must have computed exactly. As many processes as there are cores compile; then the tiles are timed, and each time
is written at once, so that the same command goes on where another one was interrupted.
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
from peqa_kernels.quant_matmul.tuning import TABLES, Measured, Scales, TileTable, table_path

SHAPES = "12288x4096,22016x4096,24576x8192,44032x8192"  # those of `make bench-kernels`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 where there is no CUDA device."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("tiles are measured on a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    import triton

    from peqa_kernels.quant_matmul.gpu_compile import Compilers
    from peqa_kernels.quant_matmul.gpu_tune import Wanted, tune

    name = torch.cuda.get_device_name()
    table = TileTable.load(name, options.folder)
    log = table_path(name, options.folder).with_suffix(".measured.jsonl")
    measured = Measured(log, f"triton {triton.__version__}")
    if options.anew:
        measured.forget()
    dtype = getattr(torch, options.dtype)
    sizes = [(int(rows), scales) for rows in options.rows.split(",") for scales in options.scales.split(",")]
    wanted = [Wanted(rows, dtype, scales) for rows, scales in sizes]
    with Compilers(options.processes) as compilers:
        for shape in options.shapes.split(","):
            n, k = (int(size) for size in shape.split("x"))
            prepared = prepare(random_weight(n, k, options.bits, options.group, "cuda"))
            for line in tune(prepared, wanted, compilers, measured):
                print(line, flush=True)
                table = table.with_line(line)
                table.save(name, options.folder)
    measured.forget()
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
    parser.add_argument("--shapes", default=SHAPES, help=f"outputs x inputs (default {SHAPES})")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=-1, help="inputs per scale; -1: one scale per output")
    parser.add_argument("--rows", default="1,16,32,64,512,2048", help="sizes of batches")
    parser.add_argument("--scales", default="channel", help=f"task scales, of {', '.join(get_args(Scales))}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--folder", type=Path, default=TABLES, help="where the tables are")
    parser.add_argument("--processes", type=int, help="that compile; default: one for each core")
    parser.add_argument("--anew", action="store_true", help="forget the times of a run that was interrupted")
    return parser


if __name__ == "__main__":
    sys.exit(main())
