"""Lossless compression of training checkpoints: one array, one file, or a Store of a run's steps."""

from tricomp.archive import compress, decompress
from tricomp.blob import decode, encode
from tricomp.bounds import Limits
from tricomp.chain import KeepEvery, KeepLast, KeyframeEvery
from tricomp.checkpoint import load, save
from tricomp.checkpoint import open_file as open  # noqa: A004
from tricomp.container import VERSION
from tricomp.content import content_id
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    InvalidIndex,
    LimitExceeded,
    MissingFile,
    MissingLeaf,
    MissingParent,
    MissingStep,
    StorageError,
    StoreLocked,
    TricompError,
    UnsupportedDtype,
    UnsupportedFormat,
    UnsupportedNode,
    UnsupportedVersion,
    WrongReference,
)
from tricomp.file import File
from tricomp.plan import Plan, Spec
from tricomp.report import LeafReport, Report, VerifyReport
from tricomp.store import Store
from tricomp.tree import register_node

__version__ = VERSION

__all__ = [
    "CorruptFile",
    "CorruptFrame",
    "File",
    "InvalidArgument",
    "InvalidIndex",
    "KeepEvery",
    "KeepLast",
    "KeyframeEvery",
    "LeafReport",
    "LimitExceeded",
    "Limits",
    "MissingFile",
    "MissingLeaf",
    "MissingParent",
    "MissingStep",
    "Plan",
    "Report",
    "Spec",
    "StorageError",
    "Store",
    "StoreLocked",
    "TricompError",
    "UnsupportedDtype",
    "UnsupportedFormat",
    "UnsupportedNode",
    "UnsupportedVersion",
    "VerifyReport",
    "WrongReference",
    "compress",
    "content_id",
    "decode",
    "decompress",
    "encode",
    "load",
    "open",
    "register_node",
    "save",
]
