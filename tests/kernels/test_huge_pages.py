"""Memory in huge pages: zeros that take nothing until they are written, and weights that move into them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import huge_pages
from peqa_kernels.native.huge_pages import HUGE_PAGE, Arena, zeros
from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight

SMAPS = Path("/proc/self/smaps")


def mapping_of(tensor: Tensor) -> dict[str, str]:
    """What Linux says of the mapping in which `tensor` begins."""
    fields: dict[str, str] = {}
    inside = False
    for line in SMAPS.read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside:
            fields[head.removesuffix(":")] = rest.strip()
    return fields


@pytest.mark.parametrize("nbytes", [1, 4097, HUGE_PAGE - 1, HUGE_PAGE, 5 * HUGE_PAGE + 12345])
def test_zeros(nbytes: int) -> None:
    found = zeros(nbytes)
    assert (found.dtype, found.shape) == (torch.uint8, (nbytes,))
    assert not found.any()
    assert found.data_ptr() % 64 == 0
    found.fill_(7)
    assert int(found.sum(dtype=torch.int64)) == 7 * nbytes
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        assert found.data_ptr() % HUGE_PAGE == 0


@pytest.mark.skipif(
    not (SMAPS.exists() and hasattr(mmap, "MADV_HUGEPAGE")), reason="a system that does not say"
)
def test_only_what_is_written_takes_memory_and_it_is_asked_for_in_huge_pages() -> None:
    found = zeros(64 * HUGE_PAGE)
    fields = mapping_of(found)
    if "hg" not in fields["VmFlags"].split():
        pytest.skip("a kernel without huge pages")
    assert fields["Rss"] == "0 kB"
    found[10 * HUGE_PAGE] = 1
    assert int(mapping_of(found)["Rss"].split()[0]) * 1024 <= 2 * HUGE_PAGE


@pytest.mark.parametrize("how", ["no constant", "no madvise", "no mmap"])
def test_without_huge_pages_memory_is_plain(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    def no_room(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    if how == "no constant":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(huge_pages.mmap, "mmap", Refusing if how == "no madvise" else no_room)
    found = zeros(2 * HUGE_PAGE)
    assert not found.any()
    found.fill_(1)
    assert int(found.sum(dtype=torch.int64)) == 2 * HUGE_PAGE


def test_an_arena_holds_copies_one_behind_the_other() -> None:
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int32), torch.randn(2, 4).half().t()]
    arena = Arena(sum(Arena.room(tensor) for tensor in tensors))
    copies = [arena.copy(tensor) for tensor in tensors]
    for mine, theirs in zip(copies, tensors, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
        assert mine.data_ptr() % 64 == 0
    assert [copy.data_ptr() - copies[0].data_ptr() for copy in copies] == [0, 64, 128]
    with pytest.raises(AssertionError):
        arena.copy(tensors[0])


@pytest.mark.parametrize("centred", [True, False])
def test_a_weight_that_moves_multiplies_as_before(centred: bool) -> None:
    ops = native.load()
    if ops is None:
        pytest.skip("no C library")
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (70, 96), dtype=torch.uint8)
    zero_points = torch.full((70, 3), 8.0) if centred else torch.rand(70, 3) * 15
    weight = QuantizedWeight(pack_codes(codes, 4), torch.rand(70, 3), zero_points, 4, 96)
    packed = ops.pack(weight)
    x = torch.randn(5, 96)

    def multiply() -> Tensor:
        return ops.quant_matmul(x, packed, None, None, None, None, None, None)

    want, before, nbytes = multiply(), packed.struct.codes, packed.nbytes
    arena = Arena(packed.room)
    packed.move_to(arena)
    assert packed.struct.codes != before
    assert packed.nbytes == nbytes <= packed.room
    del arena
    torch.full((1 << 20,), -1.0)  # into what was freed, where anything still pointed there
    assert torch.equal(multiply(), want)
