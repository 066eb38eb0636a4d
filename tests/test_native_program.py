"""The coders and the planner in a program without Python: compiled for this machine, and for aarch64 under an emulator.

A program reads what the reference wrote, and does it again: bytes, words, digests, plans and faults must be the same.
What the emulated part needs, on Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user-static.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import golden_cases, native_build
from tests.cases import decayed, moments, special_words, stepped, weights
from tests.damage_cases import damaged, sound
from tricomp import dtypes
from tricomp.dtypes import DType
from tricomp.errors import CorruptFrame
from tricomp.job import DecodeJob, EncodeJob
from tricomp.native import decode as texts
from tricomp.native import digest as sums
from tricomp.native.encode import _request
from tricomp.native.plan_numbers import pack
from tricomp.plan import Spec
from tricomp.reference import decode, digest
from tricomp.reference import encode as encoder
from tricomp.reference.planner import plan_frame

pytestmark = pytest.mark.skipif(not native_build.has_compiler(), reason="no C++ compiler here")
PROGRAM = native_build.ROOT / "tests" / "native" / "frames.cpp"
SOUND, DAMAGED, PLANNED = range(3)
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


@dataclass(frozen=True)
class Record:
    """What the program is given, and what it is to find: the digest of words, or the text of an error."""

    kind: int
    parts: tuple[Any, ...]
    digest: int = 0
    fault: str = ""
    job: DecodeJob | None = None

    def packed(self) -> bytes:
        out = [struct.pack("<Q", self.kind)]
        for part in self.parts:
            data = b"" if part is None else bytes(part) if isinstance(part, bytes) else part.tobytes()
            out.append(struct.pack("<Q", len(data)) + data)
        return b"".join(out)


def sound_record(job: EncodeJob, kind: int = SOUND, reference: Any = None, asked: bytes = b"") -> Record:
    """What becomes of a job. reference, asked: what a planner was given, beside the words."""
    coded = encoder.encode([job])[0]
    completed = pack(coded.plan, job.source, job.reference is not None)
    numbers, *side, words, old = _request(job)
    given = old if kind == SOUND else reference
    return Record(kind, (numbers, completed, *side, words, given, coded.data, asked), digest.digest(job.words))


def damaged_record(job: DecodeJob) -> Record:
    numbers = pack(job.plan, job.source, job.reference is not None)
    words: Any = b""
    fault = ""
    try:
        words = decode.decode([job])[0]
    except CorruptFrame as error:
        fault = str(error)
    assert isinstance(job.data, bytes)
    parts = (b"", numbers, *(b"",) * 6, words, job.reference, job.data, b"")
    return Record(DAMAGED, parts, fault=fault, job=job)


def planned(words: Any, reference: Any, dtype: DType, shape: tuple[int, ...], spec: Spec) -> Record:
    asked = struct.pack(f"<{1 + len(shape)}Q", spec.tier == "fast", *shape)
    return sound_record(plan_frame(words, reference, dtype, shape, spec), PLANNED, reference, asked)


def records() -> Iterator[Record]:
    for frame in sound():
        if frame.plan.n_chunks:
            yield sound_record(frame.job)
    for number, frame in enumerate(sound()[::3]):
        for job in damaged(frame, seed=number, n=4):
            record = damaged_record(job)
            # Python says so of the others, before the module sees the frame.
            if job.plan.n_chunks and "a longer chunk directory" not in record.fault:
                yield record
    f32, bf16 = dtypes.by_name("float32"), dtypes.by_name("bfloat16")
    w, v = weights((90, 800)), moments((90, 800), zero_share=0.1)
    half = (w.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    for spec in (Spec(), Spec(tier="fast")):
        for new, old in ((w, None), (stepped(w), w), (v, None), (decayed(v), v)):
            before = None if old is None else old.reshape(-1).view(np.uint32)
            yield planned(new.reshape(-1).view(np.uint32), before, f32, new.shape, spec)
        yield planned(half.reshape(-1), None, bf16, half.shape, spec)
        for name in dtypes.NAMES:
            dtype = dtypes.by_name(name)
            old = golden_cases.words(dtype, 3000, 21)
            new = golden_cases.moved(old, dtype, 22)
            for words, known in ((new, None), (new, old), (np.resize(special_words(dtype), 3000), old)):
                yield planned(words, known, dtype, (30, 100), Spec(tier=spec.tier, chunk_log2=11))


@pytest.fixture(scope="module")
def given() -> list[Record]:
    return list(records())


def check(command: list[object], given: list[Record], folder: Path, **environ: str) -> str:
    """Run the program on the records; returns the instruction set that it used."""
    (folder / "records").write_bytes(b"".join(record.packed() for record in given))
    done = subprocess.run(
        [str(part) for part in [*command, folder / "records"]],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if "does not have it" in done.stderr:
        pytest.skip("this processor does not have it")
    assert done.returncode == 0, done.stderr[-2000:]
    isa, *lines, last = done.stdout.splitlines()
    assert last == "done"
    faults: dict[int, str] = {}
    n_sums = 0
    for line in lines:
        kind, number, *rest = line.split(maxsplit=2)
        record = given[int(number)]
        assert kind != "differs", (line, record.job)
        if kind == "sum":
            assert sums.digest_end(int(rest[0]), len(record.parts[8].tobytes())) == record.digest
            n_sums += 1
        else:
            assert record.job is not None
            stage, code, request, chunk, *details = map(int, rest[0].split())
            faults[int(number)] = str(texts._fault(record.job, stage, code, request, chunk, *details))
    assert faults == {i: record.fault for i, record in enumerate(given) if record.fault}
    assert n_sums == 2 * sum(record.kind == SOUND for record in given)
    return isa.split()[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linked from the very objects of the wheel."""
    parts = ("coders", "kernels_portable", "kernels_avx2", "kernels_avx512")
    objects = [path for part in parts for path in native_build.objects(part)]
    out = tmp_path_factory.mktemp("program") / "program"
    compiler = os.environ.get("CXX") or native_build.tool("c++") or "g++"
    includes = f"-I{native_build.SOURCES}"
    native_build.run(
        compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", includes, PROGRAM, *objects, "-pthread", "-o", out
    )
    return out


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_this_machine(isa: str, program: Path, given: list[Record], tmp_path: Path) -> None:
    assert check([program], given, tmp_path, TRICOMP_ISA=isa) == isa


@pytest.mark.skipif(not shutil.which(CROSS) or not shutil.which(EMULATOR), reason=f"no {CROSS} or no {EMULATOR} here")
def test_aarch64_under_an_emulator(given: list[Record], tmp_path: Path) -> None:
    folder = native_build.build(
        "aarch64",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=CROSS,
        TRICOMP_PROGRAM=PROGRAM,
    )
    assert check([EMULATOR, folder / "program"], given, tmp_path) == "portable"
