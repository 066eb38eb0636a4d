"""Who is measured beside tricomp: zstd, blosc2 and ZipNN on the same leaves at the same number of threads.

Imports timing and the peers. Against references they get the XOR of the two, made by numpy, and its time counts in both
directions. The hard thing: ZipNN destroys what it packs, and writes outside its memory where words are cut, so it gets
bytes of its own, made off the clock, and only leaves of whole fours of bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import blosc2
import numpy as np

from tests.benchmarks.peers import zipnn
from tests.benchmarks.timing import TIERS, Contestant, Parts, Raw, Work, tricomp_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZIPNN_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
BLOSC2_CODECS = {"lz4": (blosc2.Codec.LZ4, 5), "zstd": (blosc2.Codec.ZSTD, 1)}  # codec and level


def _contestant(
    who: str,
    work: Work,
    threads: int,
    pack: Callable[[Raw], Any],
    unpack: Callable[[Any], Any],
    is_greedy: bool = False,
) -> Contestant:
    """A peer with a call for one leaf's bytes. is_greedy: pack destroys its input; unpack gives bytes to write to."""

    def each(call: Callable[[Any], Any]) -> Callable[[Parts], Parts]:
        return lambda parts: list(map(call, parts))

    bases = work.bases
    if bases is None:
        given = (lambda: [raw.copy() for raw in work.raws]) if is_greedy else (lambda: work.raws)
        return Contestant(who, threads, given, each(pack), each(unpack))

    def pack_all(raws: Parts) -> Parts:
        return [pack(np.bitwise_xor(raw, base)) for raw, base in zip(raws, bases, strict=True)]

    def unpack_all(parts: Parts) -> Parts:
        backs = [np.frombuffer(unpack(part), np.uint8) for part in parts]
        return [
            np.bitwise_xor(back, base, out=back if is_greedy else None) for back, base in zip(backs, bases, strict=True)
        ]

    return Contestant(who, threads, lambda: work.raws, pack_all, unpack_all)


def zstd_of(work: Work, level: int, threads: int) -> Contestant:
    """zstd; its threads work on packing only. It takes no reference of any other kind that is as fast as the XOR."""
    names = zstd.CompressionParameter
    options: dict[int, int] = {names.compression_level: level, names.nb_workers: 0 if threads == 1 else threads}

    def pack(raw: Raw) -> bytes:
        return zstd.compress(raw.data, options=options)

    return _contestant(f"zstd -{level}", work, threads, pack, zstd.decompress)


def blosc2_of(work: Work, codec: str, threads: int) -> Contestant:
    """blosc2: bytes shuffled by words, then zstd or lz4."""
    which, level = BLOSC2_CODECS[codec]
    word_bytes = work.arrays[0].itemsize
    packing = blosc2.CParams(
        codec=which, clevel=level, typesize=word_bytes, nthreads=threads, filters=[blosc2.Filter.SHUFFLE]
    )
    unpacking = blosc2.DParams(nthreads=threads)
    return _contestant(
        f"blosc2 {codec}",
        work,
        threads,
        lambda raw: blosc2.compress2(raw, cparams=packing),
        lambda part: blosc2.decompress2(part, dparams=unpacking),
    )


def zipnn_of(work: Work, threads: int) -> Contestant:
    """ZipNN for the dtype of the leaves."""
    one = zipnn(work.dtype, threads)
    return _contestant("ZipNN", work, threads, lambda raw: one.compress(raw.data), one.decompress, is_greedy=True)


def xor_of(work: Work) -> Contestant:
    """The XOR alone, one thread."""
    bases = work.bases or []
    return Contestant("XOR", 1, lambda: work.raws, lambda raws: list(map(np.bitwise_xor, raws, bases)), None)


def all_of(work: Work, threads: int) -> list[Contestant]:
    """Everybody who can pack these leaves, but for memcpy."""
    found = [tricomp_of(work, tier, threads) for tier in TIERS]
    if work.dtype in ZIPNN_DTYPES and all(raw.size % 4 == 0 for raw in work.raws):
        found.append(zipnn_of(work, threads))
    found += [zstd_of(work, level, threads) for level in (1, 3)]
    return found + [blosc2_of(work, codec, threads) for codec in BLOSC2_CODECS]
