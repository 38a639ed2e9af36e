"""Which bank row a starting sequence uses, and which rows must be written before the step that uses them. No torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from peqa_runtime.core import BASE_REVISION, Placement, ScaleKind
from peqa_runtime.engine.batch import BankWrite, Batch, ScheduledSequence
from peqa_runtime.engine.sequence import Sequence


class RowPlacer(Protocol):
    """Who may use a row of the scale bank (the TaskRegistry)."""

    def place(
        self, revision: str, kind: ScaleKind, *, in_use: Collection[str] | None = None
    ) -> Placement | None:
        """A row for this leased revision, never one of a revision `in_use`; None when there is no other."""


class BankRows:
    """Places sequences on rows, and remembers the writes that this asks for until a step has done them."""

    def __init__(self, placer: RowPlacer) -> None:
        self._placer = placer
        # Writes that no step has completed yet, by row: a step that fails leaves them for the next user of the row.
        self._pending: dict[int, BankWrite] = {}

    def place(self, sequence: Sequence, *, in_use: Collection[str]) -> bool:
        """Get the sequence's row; False when every row is pinned by the running revisions, `in_use`."""
        request = sequence.request
        if request.revision == BASE_REVISION:
            return True  # row 0, the default
        placement = self._placer.place(request.revision, request.kind, in_use=in_use)
        if placement is None:
            return False
        if placement.write:
            write = BankWrite(request.revision, placement.row, placement.group_row)
            self._pending[placement.row] = write
        sequence.row, sequence.group_row, sequence.holds_row = placement.row, placement.group_row, True
        return True

    def writes_for(self, shares: tuple[ScheduledSequence, ...]) -> tuple[BankWrite, ...]:
        """Pending writes that this step's sequences need. Others wait for a user: only a lease, which a scheduled
        sequence has, keeps a set in host memory."""
        if not self._pending:
            return ()
        users = {(s.sequence.row, s.sequence.request.revision) for s in shares}
        return tuple(w for w in self._pending.values() if (w.row, w.revision) in users)

    def written(self, batch: Batch) -> None:
        """Strike off the writes that the step has done."""
        for write in batch.bank_writes:
            if self._pending.get(write.row) == write:
                del self._pending[write.row]
