"""Encode and decode Snapshots: leaves to frames and back, by the backend asked for. The only importer of the backends.

Imports no framework. encoding, decoding: the two directions. batch: frames on their way through a backend. siblings:
leaves that repeat another. engine: backends and threads. accelerator, planning: the backend on a GPU.
"""

from tricomp.codec.accelerator import from_dlpack, home_of
from tricomp.codec.batch import Reference
from tricomp.codec.decoding import Decoded, StoredFrame, breakdown, decode, decode_many, decode_parts
from tricomp.codec.encoding import First, bounded, copied, encode, encode_leaf
from tricomp.codec.engine import Engine, digest, digests, live
from tricomp.plan import Frame
from tricomp.reference.digest import digest_end
from tricomp.reference.frame import head_bytes

__all__ = [
    "Decoded",
    "Engine",
    "First",
    "Frame",
    "Reference",
    "StoredFrame",
    "bounded",
    "breakdown",
    "copied",
    "decode",
    "decode_many",
    "decode_parts",
    "digest",
    "digest_end",
    "digests",
    "encode",
    "encode_leaf",
    "from_dlpack",
    "head_bytes",
    "home_of",
    "live",
]
