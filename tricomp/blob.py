"""One array in one blob of bytes: encode and decode, for callers that bring their own container. Codec plus msgpack.

A blob is a header map, the frame's bytes as msgpack bins, and a checksum of both. The hard thing: a wrong reference
must be told from damage, so the header holds the digest of the reference's words as well as the array's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np

from tricomp import bounds, codec
from tricomp.bounds import Bytes, Limits
from tricomp.codec import StoredFrame
from tricomp.container import FORMAT, START, bin_sizes, check_of, in_bins
from tricomp.dtypes import Words, by_number, from_words, of, to_words
from tricomp.errors import CorruptFile, CorruptFrame, InvalidArgument, LimitExceeded, UnsupportedVersion, WrongReference
from tricomp.layout import Leaf, is_shape, snapshot_of
from tricomp.plan import Plan, Spec, check_spec

Array = np.ndarray[Any, Any]
_WHAT = "blob"
_LARGE_BYTES = 2 << 20  # of a blob whose checksum is worth a thread
_KINDS = {"dtype": int, "shape": list, "digest": int, "plan": dict}


def encode(
    array: Array,
    reference: Array | None = None,
    spec: Spec | None = None,
    threads: int | None = None,
    backend: str | None = None,
) -> bytes:
    """Compress one array of any shape and supported dtype, losslessly unless spec asks otherwise.

    reference: an array of the same dtype and shape that decode will be given again. threads: None: one for each core
    that this process may use; the bytes are the same whatever it is. backend: see tricomp.open.
    Raises InvalidArgument, UnsupportedDtype, WrongReference (reference of another dtype or shape).
    """
    if not isinstance(array, (np.ndarray, np.generic)):
        raise InvalidArgument(f"encode: expected a numpy array, got {type(array).__name__}. Use np.asarray.")
    check_spec(spec)
    snapshot = snapshot_of(["array"], [np.asanyarray(array)])
    leaf = snapshot.layout.leaves[0]
    base = None if reference is None else to_words(_fitting(reference, leaf), "reference")
    engine = codec.Engine(threads, backend)
    frame, parent = codec.encode_leaf(snapshot, base, spec or Spec(), engine)
    header = {
        "tricomp": FORMAT,
        "dtype": leaf.dtype.number,
        "shape": list(leaf.shape),
        "digest": frame.digests[0],
        "plan": frame.plan.to_wire(),
        "parent": parent,
    }
    return engine.seal([msgpack.packb(header), *in_bins(frame.pieces(), bin_sizes(frame.n_bytes))])


def decode(
    blob: Bytes | bytearray,
    reference: Array | None = None,
    threads: int | None = None,
    limits: Limits = bounds.DEFAULTS,
    backend: str | None = None,
) -> Array:
    """The array that encode was given, in memory of its own. reference: the array it was encoded against, if any.

    threads, backend: as for encode.
    Raises WrongReference, CorruptFile, CorruptFrame, UnsupportedVersion, LimitExceeded.
    """
    return decode_into(blob, None, reference, threads, limits, backend)


def decode_into(
    blob: Bytes | bytearray,
    octets: Array | None,
    reference: Array | None = None,
    threads: int | None = None,
    limits: Limits = bounds.DEFAULTS,
    backend: str | None = None,
) -> Array:
    """The same, in the memory of octets, uint8[n_bytes], contiguous and aligned for the dtype. Raises InvalidArgument
    too, if octets has another size."""
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise InvalidArgument(f"decode: expected the bytes that encode gave, got {type(blob).__name__}.")
    if isinstance(blob, memoryview) and not blob.c_contiguous:
        raise InvalidArgument("decode: the bytes do not stand in a row in memory. Pass bytes(blob).")
    engine = codec.Engine(threads, backend)
    view = memoryview(blob).cast("B")
    with _sound(view, engine):
        return _decoded(view, octets, reference, limits, engine)


def _decoded(
    view: memoryview, octets: Array | None, reference: Array | None, limits: Limits, engine: codec.Engine
) -> Array:
    header, data = _read(view, limits)
    leaf = Leaf("array", by_number(header["dtype"]), tuple(header["shape"]))
    limits.check("max_decoded_bytes", leaf.n_bytes, _WHAT)
    plan = Plan.from_wire(header["plan"], "array")
    if plan.n_words != leaf.n_words or plan.dtype != leaf.dtype or plan.reference == "sibling":
        raise CorruptFrame(f"{_WHAT}: its plan does not fit {leaf.dtype.name}{list(leaf.shape)}.")
    if octets is not None and octets.nbytes != leaf.n_bytes:
        raise InvalidArgument(f"out: has {octets.nbytes} bytes, and {leaf.n_bytes} were encoded.")
    stored = header.get("parent")
    parent = _parent(stored, reference, leaf) if plan.reference == "parent" else None
    into = None if octets is None else [octets.view(leaf.dtype.word_dtype)]
    try:
        frame = StoredFrame([leaf], plan, data, parent, is_checked=True)
        (((words,), (computed,), came),) = codec.decode_many([frame], engine, into, wants_parents=True)
    except CorruptFrame:
        if parent is not None:
            _require_parent(stored, engine.digests([parent])[0])
        raise
    except MemoryError:
        raise LimitExceeded(f"{_WHAT}: no memory for {leaf.n_bytes} bytes.") from None
    if came is not None:
        _require_parent(stored, came)
    if computed != header["digest"]:
        raise CorruptFrame(f"{_WHAT}: digest {header['digest']:016x} stored, {computed:016x} computed.")
    return from_words(words, leaf.dtype, leaf.shape)


def _fitting(reference: Array, leaf: Leaf) -> Array:
    """The reference, if it is of the leaf's dtype and shape."""
    reference = np.asarray(reference)
    if reference.shape != leaf.shape or of(reference, "reference") != leaf.dtype:
        raise WrongReference(
            f"the array is {leaf.dtype.name}{list(leaf.shape)}, its reference "
            f"{reference.dtype.name}{list(reference.shape)}. Pass a reference of the same dtype and shape, or none."
        )
    return reference


def _parent(stored: Any, reference: Array | None, leaf: Leaf) -> Words:
    if type(stored) is not int:
        raise CorruptFile(f"{_WHAT}: was encoded against a reference, and does not say which.")
    if reference is None:
        raise WrongReference(f"{_WHAT}: was encoded against a reference of digest {stored:016x}. Pass reference=.")
    return to_words(_fitting(reference, leaf), "reference")


def _require_parent(stored: Any, came: int) -> None:
    if came != stored:
        raise WrongReference(
            f"{_WHAT}: was encoded against a reference of digest {stored:016x}, this one has {came:016x}. "
            f"Pass the array it was encoded against."
        )


@contextmanager
def _sound(blob: memoryview, engine: codec.Engine) -> Iterator[None]:
    """Compare the checksum of a blob before it is decoded, or at the same time where there are threads for it.

    Then what decoding raises of a damaged blob gives way to what is wrong with it. Raises CorruptFile,
    UnsupportedVersion.
    """
    if len(blob) < 20 or not 0x80 <= blob[0] <= 0x8F or blob[1:9] != START:
        raise CorruptFile(f"{_WHAT}: {len(blob)} bytes that are no blob of tricomp.encode, or a cut one.")
    if blob[9] != FORMAT:
        raise UnsupportedVersion(f"{_WHAT}: was written by format {blob[9]}; this tricomp reads {FORMAT}. Upgrade it.")
    body = blob[:-9]
    if engine.n_threads == 1 or len(body) < _LARGE_BYTES:
        _compare(blob, check_of(body))
        yield
        return
    computed: list[int] = []
    thread = threading.Thread(target=lambda: computed.append(check_of(body)), name="tricomp-check")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is at its end
        thread.run()
    try:
        yield
    finally:
        if thread.ident is not None:
            thread.join()
        _compare(blob, computed[0])


def _compare(blob: memoryview, computed: int) -> None:
    stored = int.from_bytes(blob[-8:], "big")
    if blob[-9] != 0xCF or stored != computed:
        raise CorruptFile(f"{_WHAT}: checksum {stored:016x} stored, {computed:016x} computed: it is cut or damaged.")


def _read(blob: memoryview, limits: Limits) -> tuple[dict[str, Any], Bytes]:
    """Header and frame of a blob."""
    body = blob[:-9]
    walker = msgpack.Unpacker(max_buffer_size=1 << 16, strict_map_key=False)
    walker.feed(body[: 1 << 16])
    try:
        walker.skip()
    except (ValueError, msgpack.UnpackException):
        raise CorruptFile(f"{_WHAT}: its header is not valid msgpack of at most 64 KiB.") from None
    offset = walker.tell()
    header = bounds.unpack(body[:offset], f"{_WHAT}: header")
    if "tree" in header:
        raise CorruptFile(f"{_WHAT}: is a .tri file, not the blob of one array. Use tricomp.open.")
    for key, kind in _KINDS.items():
        if type(header.get(key)) is not kind:
            raise CorruptFile(f"{_WHAT}: header: {key} is missing or of the wrong kind.")
    shape = header["shape"]
    limits.check("max_dimensions", len(shape), _WHAT)
    if not all(type(n) is int and n >= 0 for n in shape) or not is_shape(shape):
        raise CorruptFile(f"{_WHAT}: header: shape {shape}.")
    return header, _join_bins(body[offset:])


def _join_bins(body: memoryview) -> Bytes:
    parts: list[memoryview] = []
    while body:
        n_length = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(body[0], 0)
        end = 1 + n_length + int.from_bytes(body[1 : 1 + n_length], "big")
        if not n_length or end > len(body):
            raise CorruptFile(f"{_WHAT}: its frame is not a row of msgpack bins.")
        parts.append(body[1 + n_length : end])
        body = body[end:]
    return parts[0] if len(parts) == 1 else b"".join(parts)
