"""The writer's lock of a storage that has no locks: an object with a name, a token and a time. Imports errors only.

The hard thing: nothing frees it when its writer dies. So it tells of the writer's process: a dead one on this host is
known as dead at once. A writer on another host is known only by how long it has been silent: it writes the lock again
before and during each save, and one that was not for a lease may be taken over. The lease is an hour by default: longer
than any pause of a machine or network that a save survives, shorter than the time in which somebody looks after a job
that died. A writer that saves less often than that keeps its lock as long as nobody else asks for it.

What it cannot promise: where the storage creates objects exclusively (S3, GCS, Azure, local disks) two writers cannot
begin at once. Elsewhere, and when a lock is taken over, both write it, wait a moment, and whoever reads its own token
back goes on; a writer that was slower than that moment finds out at its next look, before its object is finished. The
times of two hosts are compared, so their clocks must agree far better than the lease.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from tricomp.errors import StorageError, StoreLocked

_log = logging.getLogger("tricomp")
LOCK_NAME = ".tricomp.lock"
LEASE_SECONDS = 3600.0
SETTLE_SECONDS = 0.5  # how long after writing a lock that another may have written too it is read back


class Objects(Protocol):
    """What a lock needs of a bucket. is_exclusive: create refuses, in one instant, what is there."""

    url: str
    is_exclusive: bool

    def read_object(self, name: str) -> bytes | None: ...

    def create_object(self, name: str, data: bytes) -> bool: ...

    def write_object(self, name: str, data: bytes) -> None: ...

    def delete_object(self, name: str) -> None: ...


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the lock tells it. machine: this boot and process namespace. began: of the process, in the
    system's ticks. seen: seconds since 1970 by the holder's clock."""

    process: int
    host: str
    machine: str
    began: int
    token: str
    seen: float

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return False
        if self.process == os.getpid():
            return self.token not in _live
        began = _began(self.process)
        return began is None or (began > 0 and self.began > 0 and began != self.began)

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.seen, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        silent = max(time.time() - self.seen, 0)
        return f"process {self.process} on host {self.host}, last seen {when}, {silent:.0f} s ago"


_live: set[str] = set()  # tokens of the locks that this process holds


class LeaseLock:
    """A lock held. may_have_company: it was taken from a writer that may still be at work."""

    def __init__(self, objects: Objects, token: str, lease: float, may_have_company: bool) -> None:
        self.may_have_company = may_have_company
        self._objects, self._token, self._lease = objects, token, lease
        self._pid = os.getpid()
        self._checked = time.monotonic()
        _live.add(token)
        self._release = weakref.finalize(self, _release, objects, token, self._pid)

    @property
    def is_held(self) -> bool:
        """Whether this process took it and has not released it; whether another took it over, refresh tells."""
        return self._pid == os.getpid() and self._release.alive

    def refresh(self) -> None:
        """Make sure that the lock is still ours, and say that its writer is alive. Raises StoreLocked."""
        holder = _read(self._objects)
        if holder is None or holder.token != self._token:
            gone = "its lock was removed" if holder is None else f"its lock was taken over by {holder}"
            raise StoreLocked(
                f"{self._objects.url}: {gone}: nothing more is written through this Store. Close it; to go on, open "
                "the Store again when no other writer is at work."
            )
        self._objects.write_object(LOCK_NAME, _self(self._token).to_bytes())
        self._checked = time.monotonic()

    def refresh_if_due(self) -> None:
        """Refresh a lock that has not been for a small part of the lease."""
        if time.monotonic() - self._checked > self._lease / 16:
            self.refresh()

    def release(self) -> None:
        """Let the next writer in."""
        self._release()


def take(objects: Objects, lease: float = LEASE_SECONDS) -> LeaseLock:
    """Become the only writer. Raises StoreLocked, naming the holder and how to break its lock; StorageError."""
    token = os.urandom(16).hex()
    is_sure, may_have_company = objects.create_object(LOCK_NAME, _self(token).to_bytes()), False
    if not is_sure:
        holder = _read(objects)
        is_old = holder is not None and time.time() - holder.seen > lease
        if holder is not None and holder.token != token:
            if not holder.is_dead and not is_old:
                raise _locked(objects, holder, lease)
            if not holder.is_dead:
                may_have_company = True
                told = "%s: took over the lock of %s, silent for longer than the lease of %g s"
                _log.warning(told, objects.url, holder, lease)
            objects.write_object(LOCK_NAME, _self(token).to_bytes())
        elif holder is None:  # released a moment ago
            is_sure = objects.create_object(LOCK_NAME, _self(token).to_bytes())
    if not (is_sure and objects.is_exclusive):
        time.sleep(SETTLE_SECONDS)
    holder = _read(objects)
    if holder is None or holder.token != token:
        raise _locked(objects, holder, lease)
    return LeaseLock(objects, token, lease, may_have_company)


def _locked(objects: Objects, holder: Holder | None, lease: float) -> StoreLocked:
    return StoreLocked(
        f"{objects.url}: is being written by {holder or 'another process'}. Wait for it to end or close its Store; "
        f"reading needs no lock. If it is dead, delete {objects.url}/{LOCK_NAME}, or wait: a lock that was not renewed "
        f"for {lease:g} s is taken over."
    )


def _read(objects: Objects) -> Holder | None:
    """Who holds the lock; None: nobody. What cannot be read is nobody's we know, and was last seen long ago."""
    data = objects.read_object(LOCK_NAME)
    if data is not None and not data:
        time.sleep(SETTLE_SECONDS)  # created, and about to be filled
        data = objects.read_object(LOCK_NAME)
    if data is None:
        return None
    unknown = Holder(0, "unknown", "", 0, "", 0.0)
    try:
        found = json.loads(data)
        values = {field.name: found[field.name] for field in fields(Holder)}
        kinds = {key: type(value) for key, value in asdict(unknown).items()}
        return Holder(**{key: kinds[key](value) for key, value in values.items()})
    except (ValueError, TypeError, KeyError, OverflowError):
        return unknown


def _release(objects: Objects, token: str, pid: int) -> None:
    if pid != os.getpid():
        return  # a fork's copy
    _live.discard(token)
    try:
        holder = _read(objects)
        if holder is not None and holder.token == token:
            objects.delete_object(LOCK_NAME)
    except (StorageError, RuntimeError) as error:  # as when the interpreter is about to end
        _log.warning("%s: the lock could not be removed: %s", objects.url, error)


def _self(token: str) -> Holder:
    return Holder(os.getpid(), socket.gethostname(), _machine(), _began(os.getpid()) or 0, token, time.time())


def _machine() -> str:
    """This boot of this machine, and the namespace of its process numbers; empty where the system does not tell."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _began(process: int) -> int | None:
    """When a process began, in ticks since the boot; 0 where the system does not tell; None: there is no such."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError):
        pass
    return 0
