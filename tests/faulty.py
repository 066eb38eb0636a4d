"""A file system for fsspec that counts what is asked of it, and fails or dies when told to. Imports fsspec, no tricomp.

Two kinds: "faulty" shows bytes as they are written, as SFTP does; "faultystore" shows an object when its upload is
complete, as S3 does, and is taken for such a one.
"""

from __future__ import annotations

import errno
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Died(BaseException):
    """The writer's process ended here."""


class World:
    """The objects behind a file system, and what is to go wrong with the calls to it.

    fault: "fail" (an error, nothing done), "late" (done, then an error), "die" (half done at most, and all calls after
    it are dropped) or "die late", at call number at.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.n_versions = 0
        self.heal()

    def heal(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.n_bytes = 0
        self.fault, self.at, self.kind, self.is_dead, self.has_struck = "", -1, "", False, False

    def strike(self, fault: str, at: int, kind: str = "") -> None:
        """kind: only calls of that kind are counted."""
        self.heal()
        self.fault, self.at, self.kind = fault, at, kind

    def names(self) -> list[str]:
        return sorted(path.rsplit("/", 1)[-1] for path in self.objects)

    def set(self, path: str, data: bytes) -> None:
        self.n_versions += 1
        self.objects[path] = self.n_versions, data

    def call(self, kind: str, path: str, is_after: bool = False) -> None:
        """One request is made, or (is_after) was."""
        if self.is_dead:
            raise OSError(errno.EIO, "the writer is dead")
        if not is_after:
            self.calls.append((kind, path))
        n_calls = sum(not self.kind or self.kind == known for known, _ in self.calls)
        if (
            n_calls - 1 != self.at
            or self.kind not in ("", kind)
            or is_after != self.fault.endswith("late")
            or self.has_struck
        ):
            return
        self.has_struck = True
        if self.fault.startswith("die"):
            self.is_dead = True
            raise Died(f"{kind} {path}")
        raise OSError(errno.EIO, f"{kind} failed")


WORLDS: dict[str, World] = {}


class _Growing:
    """A file whose bytes are seen as they are written."""

    def __init__(self, world: World, path: str) -> None:
        self.world, self.path, self.data = world, path, b""
        self.closed = False
        world.call("open", path)
        world.set(path, b"")
        world.call("open", path, is_after=True)

    def write(self, data: Any) -> int:
        data = bytes(data)
        try:
            self.world.call("write", self.path)
        except Died:
            self.world.set(self.path, self.data + data[: len(data) // 2])
            raise
        self.data += data
        self.world.set(self.path, self.data)
        self.world.call("write", self.path, is_after=True)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.world.call("close", self.path)
            self.world.call("close", self.path, is_after=True)


class _Uploading(AbstractBufferedFile):  # type: ignore[misc]
    """A file that is seen when it is complete; in parts of 700 bytes. Closing it completes it, as fsspec's do."""

    DEFAULT_BLOCK_SIZE = 700

    def __init__(self, fs: FaultyFileSystem, path: str, mode: str) -> None:
        self.parts: list[bytes] | None = []
        super().__init__(fs, path, mode, block_size=700)

    def _initiate_upload(self) -> None:
        self.fs.world.call("begin", self.path)
        self.fs.world.call("begin", self.path, is_after=True)

    def _upload_chunk(self, final: bool = False) -> bool:
        self.fs.world.call("part", self.path)
        assert self.parts is not None
        self.parts.append(self.buffer.getvalue())
        self.fs.world.call("part", self.path, is_after=True)
        if final:
            self.fs.world.call("complete", self.path)
            self.fs.world.set(self.path, b"".join(self.parts))
            self.fs.world.call("complete", self.path, is_after=True)
        return True

    def discard(self) -> None:
        self.fs.world.call("abort", self.path)
        self.parts = None


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """world: the name of the World it shows."""

    protocol: Any = "faulty"
    cachable = False

    def __init__(self, world: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.world = WORLDS[world]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self.world.call("list", path)
        path = self._strip_protocol(path)
        found = [self._about(name) for name in self.world.objects if path in (name, name.rpartition("/")[0])]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [about["name"] for about in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self.world.call("info", path)
        return self._about(self._strip_protocol(path))

    def _about(self, path: str) -> dict[str, Any]:
        if path not in self.world.objects:
            raise FileNotFoundError(path)
        version, data = self.world.objects[path]
        return {"name": path, "size": len(data), "type": "file", "generation": version}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.world.call("read", path)
        if path not in self.world.objects:
            raise FileNotFoundError(path)
        data = self.world.objects[path][1][start:end]
        self.world.n_bytes += len(data)
        return data

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.world.call("pipe", path)
        if mode == "create" and path in self.world.objects:
            raise FileExistsError(path)
        self.world.set(path, bytes(value))
        self.world.call("pipe", path, is_after=True)

    def rm_file(self, path: str) -> None:
        self.world.call("remove", path)
        if self.world.objects.pop(path, None) is None:
            raise FileNotFoundError(path)
        self.world.call("remove", path, is_after=True)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        assert mode == "wb"
        return _Growing(self.world, path)


class FaultyStore(FaultyFileSystem):
    protocol = ("faultystore", "s3")

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return _Uploading(self, path, mode)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
fsspec.register_implementation("faultystore", FaultyStore, clobber=True)
