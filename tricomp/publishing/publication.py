"""What publishing is told and tells: Options and Publication. And the base that a caller names, opened.

Imports checksums, compression and local. The hard thing: what is not installed is told before anything is compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tricomp.codec import Engine
from tricomp.errors import InvalidArgument
from tricomp.plan import Spec, check_spec
from tricomp.publishing import checksums, compression, difference, shards
from tricomp.publishing.local import open_copy
from tricomp.publishing.tensors import Tensor, tensors_of

Path = str | os.PathLike[str]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Publication:
    """What publish did. path: of the version's folder. base: the version a delta builds on; None: it is full.

    encoding: of a delta's payloads in safetensors, else "". n_changed: tensors that were written, of n_tensors.
    raw_bytes: of the state. file_bytes: written, but for an index. why: it is full, though a base was there. is_new:
    False: this very version was there already, and nothing was written.
    """

    path: str
    version: int
    base: int | None
    format: str
    encoding: str
    n_tensors: int
    n_changed: int
    raw_bytes: int
    file_bytes: int
    seconds: float
    why: str = ""
    is_new: bool = True


@dataclass(frozen=True)
class Options:
    """How to publish, see publish."""

    full: bool | None = None
    format: str = "safetensors"
    encoding: str = "auto"
    checksum: str = "xxh3-128"
    level: int = 1
    spec: Spec | None = None
    shard_bytes: int = shards.SHARD_BYTES
    threads: int | None = None
    storage_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises InvalidArgument."""
        _require(self.format, ("safetensors", "tri"), "format")
        _require(self.encoding, ("auto", *difference.ENCODINGS), "encoding")
        _require(self.checksum, checksums.FORMATS, "checksum")
        if self.full not in (None, True, False):
            raise InvalidArgument(f"full: expected True, False or None, got {self.full!r:.80}.")
        if type(self.shard_bytes) is not int or self.shard_bytes < 1:
            raise InvalidArgument(f"shard_bytes: expected bytes, 1 or more, got {self.shard_bytes!r:.80}.")
        check_spec(self.spec)
        if self.spec is not None and self.spec.keep_mantissa_bits:
            raise InvalidArgument("spec: keep_mantissa_bits rounds, and what is published must be what was given.")
        if self.format == "safetensors":
            compression.check_level(self.level)
            checksums.hasher(self.checksum)

    @property
    def n_threads(self) -> int:
        return Engine(self.threads).n_threads


@contextmanager
def open_base(base: Mapping[str, Any] | Path | None) -> Iterator[State | None]:
    """The state that was given as base. Raises InvalidArgument, CorruptFile, UnsupportedNode, UnsupportedDtype."""
    if base is None or not isinstance(base, (str, os.PathLike)):
        yield None if base is None else tensors_of(base, "publish: base")
        return
    found = open_copy(os.fspath(base))
    if found is None:
        raise InvalidArgument(f"{os.fspath(base)}: there is no model in safetensors. Give its folder.")
    with found:
        yield dict(sorted(found.tensors.items()))


def _require(value: Any, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise InvalidArgument(f"{what}: expected one of {', '.join(allowed)}, got {value!r:.80}.")
