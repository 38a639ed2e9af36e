"""Where leases are given out: a task's current revision, a kept one by its digest's beginning, a blend of them.

A lease is pinned at once, but for a kept revision, which only the disk knows; its set is there when the future is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from peqa_runtime.core import BASE_REVISION, Blend, Lease
from peqa_runtime.errors import InvalidRequest, NoSuchRevision, StoreError, UnknownTask
from peqa_runtime.scales.blend import blend_revision, mix
from peqa_runtime.scales.host_cache import HostCache
from peqa_runtime.scales.revision_name import names_revision, split_revision
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.scale_store import ScaleStore, unusable
from peqa_runtime.scales.task_registry import TaskRegistry


class LeaseDesk:
    """Gives out leases. `arranged`: a set as it is held in memory; `unusable`: reasons by task.

    `moved(lease)`: whether the task has another revision, or none, since the lease; may read the disk.
    """

    def __init__(
        self,
        store: ScaleStore,
        registry: TaskRegistry,
        host: HostCache,
        *,
        arranged: Callable[[ScaleSet], ScaleSet],
        moved: Callable[[Lease], bool],
        unusable: Callable[[], Mapping[str, str]],
    ) -> None:
        self._store = store
        self._registry = registry
        self._host = host
        self._arranged = arranged
        self._moved = moved
        self._unusable = unusable

    def acquire_soon(self, choice: str | Blend) -> Future[Lease]:
        """Pin the revision that a task or blend has now; the result is there once its set is in memory.

        Cancelled before that, it releases the lease by itself. Raises `UnknownTask`, `TaskUnusable`,
        `TaskQuarantined`; of a blend `InvalidRequest` when one of its tasks is not of kind "channel". The future may
        fail with `StoreError`.

        "sql@1a2b" is the kept revision of `sql` that begins so, whatever is current: everything then comes with the
        future, `NoSuchRevision` and (where several begin so) `InvalidRequest` too.
        """
        return self._acquire(choice, retries=1)

    def _acquire(self, choice: str | Blend, retries: int) -> Future[Lease]:
        """`retries` of a load that failed though nothing has changed: the same content may have left and come back."""
        result: Future[Lease] = Future()
        if names_revision(choice):
            self._host.later(lambda: self._look_up(choice, result))
        else:
            self._load(choice, *self._pin(choice), result, retries)
        return result

    def _look_up(self, choice: str | Blend, result: Future[Lease]) -> None:
        """Pin what a choice of kept revisions names, then go on as for any other."""
        try:
            pinned = self._pin(choice)
        except BaseException as error:  # noqa: BLE001  it must reach whoever waits for the result
            if result.set_running_or_notify_cancel():
                result.set_exception(error)
            return
        self._load(choice, *pinned, result, 0)

    def _load(
        self, choice: str | Blend, lease: Lease, members: list[Lease], result: Future[Lease], retries: int
    ) -> None:
        """Have the set in memory, then hand the lease over."""

        def hand_over() -> None:
            if result.set_running_or_notify_cancel():
                result.set_result(lease)
            else:
                self.release(lease)

        if lease.revision == BASE_REVISION or self._host.hit(lease.revision):
            self._release_all(members)
            hand_over()
            return

        def loaded(load: Future[ScaleSet]) -> None:
            self._release_all(members)
            error = load.exception()
            if error is None:
                hand_over()
                return
            self.release(lease)
            if result.set_running_or_notify_cancel():
                self._try_again(choice, members or [lease], error, result, retries)

        def read() -> ScaleSet:
            return self._mixed(lease.blend, members) if lease.blend else self._read(lease)

        self._host.load(lease.revision, read).add_done_callback(loaded)

    def release(self, lease: Lease) -> None:
        """Give a lease back, exactly once."""
        self._registry.release(lease)
        if lease.revision != BASE_REVISION:
            self._host.shrink()

    def _pin(self, choice: str | Blend) -> tuple[Lease, list[Lease]]:
        """A lease, and for a blend the leases of its members, which are needed until it is mixed."""
        if isinstance(choice, str):
            return self._pin_task(choice), []
        members: list[Lease] = []
        try:
            for task, _ in choice.shares:
                members.append(self._pin_task(task))
                if members[-1].kind != "channel":
                    raise InvalidRequest(
                        f"task {task!r} is of kind {members[-1].kind!r}; only sets of kind 'channel' can be blended",
                        param="task",
                    )
            return self._registry.hold(_blended(choice, members)), members
        except BaseException:
            self._release_all(members)
            raise

    def _pin_task(self, name: str) -> Lease:
        task, prefix = split_revision(name)
        try:
            return self._registry.acquire(task) if prefix is None else self._pin_kept(task, prefix)
        except UnknownTask:
            reason = self._unusable().get(task)
            if reason is None:
                raise
            raise unusable(task, reason) from None

    def _pin_kept(self, task: str, prefix: str) -> Lease:
        """A lease on a kept revision. The current one is leased as such, so that its quarantine holds."""
        entry = self._store.kept(task, prefix)
        if self._registry.current(task) == entry.revision:
            lease = self._registry.acquire(task)
            if lease.revision == entry.revision:
                return lease
            self.release(lease)  # changed in between
        if entry.base_digest != self._store.manifest.base_digest:
            raise unusable(f"{task}@{prefix}", f"it belongs to another base, {entry.base_digest[:12]}…")
        if not self._registry.can_ever_place(entry.kind):
            raise unusable(f"{task}@{prefix}", f"this server has no rows for kind {entry.kind!r}")
        return self._registry.hold(Lease(task, entry.revision, entry.kind, entry.prompt_format))

    def _release_all(self, leases: list[Lease]) -> None:
        for lease in leases:
            self.release(lease)

    def _read(self, lease: Lease) -> ScaleSet:
        return self._arranged(self._store.load(lease.task, lease.revision))

    def _mixed(self, blend: Blend, members: list[Lease]) -> ScaleSet:
        sets = [None if m.revision == BASE_REVISION else self._held_or_read(m) for m in members]
        return mix(_shares(blend, members), sets)

    def _held_or_read(self, lease: Lease) -> ScaleSet:
        held = self._host.get(lease.revision)
        return self._read(lease) if held is None else self._arranged(held)

    def _try_again(
        self,
        choice: str | Blend,
        leases: list[Lease],
        error: BaseException,
        result: Future[Lease],
        retries: int,
    ) -> None:
        """After a failed load: again when a task concerned has changed or left meanwhile, or `retries` are left."""
        try:
            if not isinstance(error, StoreError | NoSuchRevision | UnknownTask):
                raise error
            if names_revision(choice):
                lease, members = self._pin(choice)  # raises what is true now, when it has left meanwhile
                self._release_all([lease, *members])
                raise error
            moved = any(self._moved(lease) for lease in leases)
            if not moved and not retries:
                raise error
            again = self._acquire(choice, retries if moved else retries - 1)
        except BaseException as final:  # noqa: BLE001  it must reach whoever waits for the result
            result.set_exception(final)
            return
        again.add_done_callback(lambda done: _pass_on(done, result))


def _blended(blend: Blend, members: list[Lease]) -> Lease:
    """What a blend of leased members is, not pinned yet."""
    tuned = [member for member in members if member.revision != BASE_REVISION]
    revision = blend_revision(_shares(blend, members)) if tuned else BASE_REVISION
    formats = {member.prompt_format for member in tuned} or {""}
    prompt_format = formats.pop() if len(formats) == 1 else None
    return Lease(blend.name, revision, "channel", prompt_format, blend)


def _shares(blend: Blend, members: list[Lease]) -> list[tuple[str, float]]:
    return [(member.revision, share) for member, (_, share) in zip(members, blend.shares, strict=True)]


def _pass_on(done: Future[Lease], result: Future[Lease]) -> None:
    error = done.exception()
    if error is None:
        result.set_result(done.result())
    else:
        result.set_exception(error)
