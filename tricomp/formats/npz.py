"""The npz format: arrays in a zip. Stored members are views of the file; compressed ones are inflated to a file.

Members that are no arrays are flat bytes. Imports no framework. The hard thing: a zip says everything twice, and may
lie about sizes; so what is read is bounded by what is there, and two members never share bytes.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgpack
import numpy as np

from tricomp import bounds
from tricomp import tree as trees
from tricomp.bounds import Bytes
from tricomp.errors import CorruptFile, InvalidArgument, StorageError
from tricomp.file import File
from tricomp.folder import LocalFile
from tricomp.formats import npy
from tricomp.formats.export import named_leaves
from tricomp.formats.origin import Origin, Span, TensorFile, check_sizes, sizes_of
from tricomp.formats.span import Leaves, decoded, spans_of
from tricomp.layout import Leaf
from tricomp.spool import Scratch
from tricomp.storage import Source

Array = np.ndarray[Any, Any]
_LOCAL = struct.Struct("<4s5HLLL2H")  # a member's own header; names and extra fields follow
_DATE = (1980, 1, 1, 0, 0, 0)  # numpy writes this one
_PIECE_BYTES = 1 << 20
_MOST_INFLATED = 1032  # bytes that one byte of deflate gives at most
_MAX_NAME_BYTES = 60_000  # a zip has two bytes for the length
_ADVICE = "Copy it again, or save it anew."
# What zipfile raises on damaged zips, struct.error and the like included.
_FAULTS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError, OSError,
           struct.error, zlib.error, OverflowError)  # fmt: skip


class Npz:
    """The format "npz", see tricomp.formats.base.Format."""

    name = "npz"
    suffixes = (".npz",)

    def matches(self, head: bytes, path: str) -> bool:
        """A zip whose first member is an array by name, or that is called .npz."""
        if head.startswith(b"PK\x05\x06"):
            return path.lower().endswith(self.suffixes)
        if not head.startswith(b"PK\x03\x04") or len(head) < _LOCAL.size:
            return False
        n_name = _LOCAL.unpack_from(head)[9]
        return head[_LOCAL.size : _LOCAL.size + n_name].endswith(b".npy") or path.lower().endswith(self.suffixes)

    def read(self, path: str) -> TensorFile:
        """A flat dict, keys as np.load has them; members that are no arrays are uint8[n_bytes]."""
        source = LocalFile(path)
        try:
            with _opened(path, source) as archive:
                members = _members(archive, source)
                if all(info.compress_type == zipfile.ZIP_STORED for info in members.values()):
                    return _read_stored(path, source, members)
                return _read_inflated(path, source, archive, members)
        except BaseException:
            source.close()
            raise

    def pieces(self, file: File) -> Iterator[Bytes]:
        """Members stored, in the tree's order; or as they were, compressed, if that is what the tree came from.

        bfloat16 and float8 as numpy itself writes them: np.load gives raw V2 or V1, to be viewed as the dtype.
        """
        notes = file.metadata.get("npz")
        if isinstance(notes, dict) and {"contents", "members"} <= notes.keys():
            return _zipped(_inflated_members(file, notes))
        leaves = named_leaves(file, "npz")
        names: set[str] = set()
        for name, leaf in leaves:
            if "\0" in name or name in names or len(name.encode()) > _MAX_NAME_BYTES:
                raise InvalidArgument(f"leaf {leaf.path!r}: a zip cannot hold that name. Rename the leaf.")
            names.add(name)
        return _zipped(_stored_members(leaves, file))


def _refused(source: Source, what: str) -> InvalidArgument:
    return InvalidArgument(f"{source.name}: {what}. {_ADVICE}")


def _opened(path: str, source: Source) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _FAULTS as error:
        raise _refused(source, f"expected a zip (npz), got a damaged one: {error}") from None


def _members(archive: zipfile.ZipFile, source: Source) -> dict[str, zipfile.ZipInfo]:
    """Key (without ".npy") to member, in the order of the file."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        key = info.filename.removesuffix(".npy")
        if key in members:
            raise _refused(source, f"expected each name once, got two of {key!r}")
        if info.flag_bits & 1:
            raise _refused(source, f"{info.filename!r} is encrypted")
        if len(key.encode()) > _MAX_NAME_BYTES:
            raise _refused(source, f"expected names of at most {_MAX_NAME_BYTES} bytes, got {key[:40]!r}...")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may ask for any memory
            raise _refused(
                source, f"{info.filename!r}: expected it stored or deflated, got method {info.compress_type}"
            )
        members[key] = info
    return members


def _begin(info: zipfile.ZipInfo, source: Source) -> int:
    """Where a member's bytes begin; they are all in the file."""
    try:
        signature, _, flags, method, *_, n_name, n_extra = _LOCAL.unpack(source.read(info.header_offset, _LOCAL.size))
    except CorruptFile:
        signature, flags, method, n_name, n_extra = b"", 0, -1, 0, 0
    begin: int = info.header_offset + _LOCAL.size + n_name + n_extra
    if signature != b"PK\x03\x04" or flags & 1 or method != info.compress_type:
        raise _refused(source, f"{info.filename!r}: expected its header at {info.header_offset}, got none")
    if info.compress_size < 0 or begin + info.compress_size > source.n_bytes:
        raise _refused(source, f"{info.filename!r}: expected {info.compress_size} bytes at {begin}: it is cut")
    return begin


def _placed(source: Source, start: int, n_bytes: int, what: str) -> npy.Placed:
    """The array in a member, whatever the member's name; or the member's bytes."""
    if bytes(source.read(start, min(n_bytes, len(npy.MAGIC)))) == npy.MAGIC:
        return npy.array_at(source, start, n_bytes, what)
    data = source.read(start, n_bytes)
    return npy.Placed(np.frombuffer(data, np.uint8) if n_bytes else np.zeros(0, np.uint8), start, n_bytes, None, False)


def _read_stored(path: str, source: LocalFile, members: dict[str, zipfile.ZipInfo]) -> TensorFile:
    tree: dict[str, Array] = {}
    spans: list[Span] = []
    at = 0
    for key, info in members.items():
        begin = _begin(info, source)
        if info.compress_size != info.file_size or begin < at:
            raise _refused(source, f"{info.filename!r}: expected {info.file_size} bytes of its own")
        at = begin + info.compress_size
        placed = _placed(source, begin, info.file_size, f"{source.name}: {info.filename!r}")
        tree[key] = placed.array
        spans.append(placed.span(trees.join(None, key)))
    return TensorFile(os.path.basename(path), "npz", tree, source.n_bytes, tuple(spans), source)


def _read_inflated(
    path: str, source: LocalFile, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> TensorFile:
    """The arrays are views of a scratch file of all members' contents; its origin is noted for the writer."""
    name = os.path.basename(path)
    at = 0
    for info in members.values():  # before anything is inflated: one deflated text could be the content of many
        begin = _begin(info, source)
        if begin < at:
            raise _refused(source, f"{info.filename!r}: expected {info.compress_size} bytes of its own")
        at = begin + info.compress_size
    scratch = Scratch(source.name, f"what is inflated of {source.name}")
    try:
        starts = {key: _inflate(archive, info, source, scratch) for key, info in members.items()}
        placed = {
            key: _placed(scratch, starts[key], info.file_size, f"{source.name}: {info.filename!r}")
            for key, info in members.items()
        }
        spans = tuple(each.span(trees.join(None, key)) for key, each in placed.items())
        tree = {key: each.array for key, each in placed.items()}
        contents = TensorFile(name, "npz", tree, scratch.n_bytes, spans, scratch).origins()[0]
    finally:
        scratch.close()
    listed = [[info.filename, info.file_size, info.compress_type != zipfile.ZIP_STORED] for info in members.values()]
    notes = {"contents": contents.to_metadata(), "members": zlib.compress(msgpack.packb(listed), 9)}
    return TensorFile(name, "npz", tree, source.n_bytes, None, source, {"npz": notes})


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Source, scratch: Scratch) -> int:
    """Append a member's content to a scratch file; returns where it begins there."""
    if info.file_size > info.compress_size * _MOST_INFLATED + 64:
        raise _refused(
            source, f"{info.filename!r}: {info.compress_size} bytes cannot hold the {info.file_size} declared"
        )
    what = f"{source.name}: {info.filename!r}: bytes to inflate"
    bounds.DEFAULTS.check("max_decoded_bytes", scratch.n_bytes + info.file_size, what)
    start = scratch.n_bytes
    try:
        with archive.open(info) as member:
            while piece := member.read(_PIECE_BYTES):
                scratch.append(piece)
    except StorageError:  # of the scratch file
        raise
    except _FAULTS as error:
        raise _refused(source, f"{info.filename!r}: cannot be inflated: {error}") from None
    if scratch.n_bytes - start != info.file_size:
        raise _refused(source, f"{info.filename!r}: expected {info.file_size} bytes, got {scratch.n_bytes - start}")
    return start


_Member = tuple[str, bool, Iterable[Bytes]]  # name, is_deflated, content


def _stored_members(leaves: Sequence[tuple[str, Leaf]], file: File) -> Iterator[_Member]:
    only = [leaf for _, leaf in leaves]
    for (name, leaf), (_, found) in zip(leaves, decoded(spans_of(only), Leaves(only), file), strict=True):
        yield f"{name}.npy", False, _behind(npy.head_of(leaf), found)


def _behind(head: bytes, rest: Iterator[Bytes]) -> Iterator[Bytes]:
    yield head
    yield from rest


def _inflated_members(file: File, notes: dict[str, Any]) -> Iterator[_Member]:
    """The members that were inflated, as noted by the reader. Raises CorruptFile."""
    what = f"{file.name}: metadata of an npz"
    packed = notes["members"]
    if not isinstance(packed, bytes):
        raise CorruptFile(f"{what}: expected its members, got {type(packed).__name__}.")
    leaves = Leaves(map(file.leaf, file))
    check_sizes([sizes_of(notes["contents"])], len(leaves), bounds.DEFAULTS, what)
    contents = Origin.from_metadata(notes["contents"], file, leaves=leaves)
    if not contents.is_exact:
        raise CorruptFile(f"{what}: expected the contents of its members, got none.")
    inflater = zlib.decompressobj()
    try:
        listed = bounds.unpack(inflater.decompress(packed, bounds.DEFAULTS.max_table_bytes), what)
        members = [(str(name), int(n_bytes), bool(is_deflated)) for name, n_bytes, is_deflated in listed]
    except (zlib.error, ValueError, TypeError) as error:
        raise CorruptFile(f"{what}: {error}.") from None
    if any(len(name.encode()) > _MAX_NAME_BYTES + 4 for name, _, _ in members):
        raise CorruptFile(f"{what}: a zip cannot hold the name of one of its members.")
    if any(n_bytes < 0 for _, n_bytes, _ in members) or sum(n for _, n, _ in members) != contents.n_bytes:
        raise CorruptFile(f"{what}: its members do not have {contents.n_bytes} bytes together.")
    return _cut(members, contents.pieces(file))


def _cut(members: Sequence[tuple[str, int, bool]], pieces: Iterator[Bytes]) -> Iterator[_Member]:
    rest: Bytes = b""

    def content(n_bytes: int) -> Iterator[Bytes]:
        nonlocal rest
        while n_bytes:
            rest = memoryview(rest or next(pieces))
            yield rest[:n_bytes]
            taken = min(n_bytes, len(rest))
            rest, n_bytes = rest[taken:], n_bytes - taken

    for name, n_bytes, is_deflated in members:
        yield name, is_deflated, content(n_bytes)


class _Sink:
    """A stream that zipfile can write to and not seek in."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: Bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> list[bytes]:
        parts, self._parts = self._parts, []
        return parts


def _zipped(members: Iterator[_Member]) -> Iterator[Bytes]:
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, is_deflated, content in members:
            info = zipfile.ZipInfo(name, _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED if is_deflated else zipfile.ZIP_STORED
            with archive.open(info, "w", force_zip64=True) as member:
                for piece in content:
                    member.write(piece)
                    yield from sink.take()
            yield from sink.take()
    yield from sink.take()
