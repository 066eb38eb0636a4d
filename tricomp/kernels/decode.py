"""Decode frames on a device: check on the host, send the chunks that are wanted, launch, and learn what was damaged.

Imports ground, numpy, torch, xxhash and the kernels. Gives the words of `tricomp.reference.decode`, in tensors on the
device, and its errors, text by text. The hard thing: bytes may be hostile, and what only a stream's end shows is known
long after the launch. So whatever kernels read by is checked before, and each chunk has a row where they tell of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from tricomp.errors import BackendError, CorruptFrame, InvalidArgument
from tricomp.kernels.decode_kernel import cast_kernel, copy_kernel, decode_kernel, patch_kernel, plane_kernel
from tricomp.kernels.decode_work import (
    DeviceDecodeJob,
    Looked,
    casts,
    copies,
    frame_row,
    patches,
    placed,
    plane_programs,
    plane_streams,
    programs,
)
from tricomp.kernels.device import Device, Upload
from tricomp.kernels.frame import ALIGN, ROW, Fault, Field, Part, Stream, aligned
from tricomp.kernels.payload import (
    Chunks,
    Sections,
    check_room,
    chunk_fault,
    chunks_of,
    cut,
    is_padded,
    open_directory,
    read_payload,
    told_fault,
)

Array = np.ndarray[Any, Any]
Checksums = Callable[[Array, Array, Array], Array]
"""Octets (uint8), first byte of each part, bytes of each part -> XXH3 of each, uint64."""

_BLOCK = 1024  # words that a program copies, casts or patches at a time


def checksums_of(octets: Array, begins: Array, sizes: Array) -> Array:
    """XXH3 of parts of some octets, one after the other; see Checksums."""
    parts = zip(begins.tolist(), sizes.tolist(), strict=True)
    return np.array([xxhash.xxh3_64_intdigest(octets[begin : begin + size].data) for begin, size in parts], np.uint64)


def decode(jobs: Sequence[DeviceDecodeJob], device: Device, checksums: Checksums = checksums_of) -> Pending:
    """Launch the decoding of frames on the device's current stream. Nothing waits for it; the result does.

    Raises CorruptFrame where a frame's directory does not fit it, OutOfDeviceMemory, and for tensors that do not fit
    their job InvalidArgument, or BackendError where they are on another device.
    """
    for job in jobs:
        _check_tensors(job, device)
    for job in jobs:
        check_room(job.stored)
    directories = [open_directory(job.stored) for job in jobs]
    staged = _stage(jobs, directories, device)
    chunks, plans = _wanted(jobs, directories, staged), [job.plan for job in jobs]
    sections = cut(plans, chunks)
    n_sound, fault = _first_fault(jobs, chunks, sections, staged.octets, checksums)
    told = device.zeros((max(n_sound, 1), int(Fault.N)), torch.uint8)
    held = _launch(jobs, chunks.first(n_sound), sections, staged, told, device)
    return Pending(jobs, chunks.first(n_sound), fault, staged, told, held, device)


class Pending:
    """Frames that a device is decoding."""

    def __init__(
        self,
        jobs: Sequence[DeviceDecodeJob],
        chunks: Chunks,
        fault: CorruptFrame | None,
        staged: _Staged,
        told: torch.Tensor,
        held: list[Any],
        device: Device,
    ) -> None:
        self._jobs, self._chunks, self._fault, self._staged, self._held = jobs, chunks, fault, staged, held
        self._told = device.to_host(told)
        self._done = device.event()

    def result(self) -> None:
        """Wait until all targets are written. Raises CorruptFrame, naming chunk and frame.

        Of several faults, that of the first chunk is told. What targets hold then means nothing.
        """
        self._done.wait()
        self._held.clear()
        told = self._told.array()[: len(self._chunks)]
        damaged = np.flatnonzero(told.any(axis=1))
        if len(damaged):
            raise self._told_fault(int(damaged[0]), told[damaged[0]])
        if self._fault is not None:
            raise self._fault

    def _told_fault(self, chunk: int, told: Array) -> CorruptFrame:
        """What kernels found in a chunk. Its indices and patches are looked at again, for the text and the order."""
        job = self._jobs[int(self._chunks.job[chunk])]
        fault = _read_again(job, self._chunks, chunk, self._staged.octets)
        return fault or chunk_fault(int(self._chunks.number[chunk]), job.name, told_fault(told))


def _check_tensors(job: DeviceDecodeJob, device: Device) -> None:
    n_words, width = max(job.end - job.start, 0), job.plan.dtype.word_bits
    source_width = job.source.word_bits if job.plan.predict == "cast" and job.source is not None else width
    for what, tensor, bits in (("target", job.target, width), ("reference", job.reference, source_width)):
        if tensor is None:
            continue
        if tensor.numel() != n_words or tensor.element_size() * 8 != bits or not tensor.is_contiguous():
            raise InvalidArgument(
                f"leaf {job.name!r}: its {what} should be a contiguous tensor of {n_words} words of {bits} bits, got "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}."
            )
        if tensor.device != device.handle:
            raise BackendError(
                f"leaf {job.name!r}: its {what} is on {tensor.device}, but decoding happens on {device.handle}. "
                f"Bring it there, or decode with backend='native'."
            )


@dataclass(frozen=True)
class _Staged:
    """The chunks that are wanted, in host memory and on the device.

    octets: uint8[...], each frame's chunks one after the other, zeros up to the next multiple of 16. shifts: of each
    job, what to take off a byte of its frame to have the octet. payload: on the device, slack behind it.
    """

    octets: Array
    shifts: list[int]
    payload: torch.Tensor


def _stage(jobs: Sequence[DeviceDecodeJob], directories: Sequence[tuple[Array, Array]], device: Device) -> _Staged:
    """Bring the chunks that are wanted to the device, in one transfer."""
    spans, shifts, n_octets, slack = [], [], 0, ALIGN
    for job, (rows, begins) in zip(jobs, directories, strict=True):
        shifts.append(0)
        if not job.numbers:
            continue
        data, first, last = job.stored.data, job.numbers[0], job.numbers[-1]
        # With the padding after the last one, where another chunk follows.
        begin, end = int(begins[first]), min(int(begins[last]) + aligned(int(rows[last, 2])), len(data))
        shifts[-1] = begin - n_octets
        spans.append((data, begin, end, n_octets))
        n_octets += aligned(end - begin)
        # One word a lane and step, for every position of a chunk, from where a stream begins, and one that is read
        # when all are: see decode_kernel.py.
        n_positions = min(1 << job.plan.chunk_log2, job.plan.n_words) + 2 * ROW
        slack = max(slack, n_positions * max(2, job.plan.dtype.word_bits // 8))
    host = torch.empty(n_octets + slack, dtype=torch.uint8, pin_memory=device.is_accelerator)
    octets = host.numpy()
    for data, begin, end, place in spans:
        octets[place : place + end - begin] = np.frombuffer(data[begin:end], np.uint8)
        octets[place + end - begin : place + aligned(end - begin)] = 0
    payload = host
    if device.is_accelerator:
        payload = device.empty(n_octets + slack, torch.uint8)
        payload[:n_octets].copy_(host[:n_octets], non_blocking=True)
    return _Staged(octets[:n_octets], shifts, payload)


def _wanted(jobs: Sequence[DeviceDecodeJob], directories: Sequence[tuple[Array, Array]], staged: _Staged) -> Chunks:
    wanted = []
    for number, (job, (rows, begins)) in enumerate(zip(jobs, directories, strict=True)):
        part = slice(job.numbers.start, job.numbers.stop)
        if job.numbers:
            wanted.append((number, job.numbers, rows[part], begins[part] - staged.shifts[number]))
    return chunks_of([job.plan for job in jobs], wanted)


def _first_fault(
    jobs: Sequence[DeviceDecodeJob], chunks: Chunks, sections: Sections, octets: Array, checksums: Checksums
) -> tuple[int, CorruptFrame | None]:
    """How many chunks may be decoded, and what is wrong with the one after them, or last with the last of them."""
    is_open = np.array([not job.is_checked for job in jobs], np.bool_)[chunks.job]
    stored = (chunks.rows[:, 0] | chunks.rows[:, 1] << 32).view(np.uint64)
    computed = stored.copy()
    computed[is_open] = checksums(octets, chunks.begin[is_open], chunks.n_bytes[is_open])
    faulty = _first((computed != stored) | sections.is_faulty)
    unpadded = _first(~is_padded(chunks, octets))
    if unpadded < faulty:  # told after what its streams may tell
        job = jobs[int(chunks.job[unpadded])]
        return unpadded + 1, chunk_fault(int(chunks.number[unpadded]), job.name, "the padding after it is not zero")
    if faulty == len(chunks):
        return faulty, None
    job = jobs[int(chunks.job[faulty])]
    if computed[faulty] != stored[faulty]:
        text = f"checksum {int(stored[faulty]):016x} stored, {int(computed[faulty]):016x} computed"
        return faulty, chunk_fault(int(chunks.number[faulty]), job.name, text)
    fault = _read_again(job, chunks, faulty, octets)
    assert fault is not None
    return faulty, fault


def _first(flags: Array) -> int:
    """The first that is set; how many there are, if none is."""
    return int(np.argmax(flags)) if flags.any() else len(flags)


def _read_again(job: DeviceDecodeJob, chunks: Chunks, chunk: int, octets: Array) -> CorruptFrame | None:
    """What is wrong with a payload as such."""
    begin, row = int(chunks.begin[chunk]), chunks.rows[chunk].tolist()
    try:
        read_payload(job.plan, job.side, int(chunks.n_words[chunk]), row[2:], octets[begin : begin + row[2]].data)
    except CorruptFrame as fault:
        return chunk_fault(int(chunks.number[chunk]), job.name, fault)
    return None


def _launch(
    jobs: Sequence[DeviceDecodeJob],
    chunks: Chunks,
    sections: Sections,
    staged: _Staged,
    told: torch.Tensor,
    device: Device,
) -> list[Any]:
    """Launch everything that decodes some chunks, which are sound as far as sections go. Returns what must live on."""
    n_each, plans = device.chunks_a_program, [job.plan for job in jobs]
    is_coded = ~chunks.is_raw & np.array([plan.entropy != "none" for plan in plans], np.bool_)[chunks.job]
    members = np.unique(chunks.job[is_coded]).tolist()
    rows_of = {number: chunks.of(number)[is_coded[chunks.of(number)]] for number in members}
    sides, tables = Upload(device), Upload(device)
    looked = Looked(jobs, members, sides)
    sides.send()
    addresses = staged.payload.data_ptr() + chunks.begin
    coded = sections.streams[sections.streams[:, 0] < len(chunks)]
    streams, kinds, n_bytes = plane_streams(plans, chunks, coded, addresses, looked.plane_tables(len(jobs)))
    planes = device.empty(int(n_bytes.sum()), torch.uint8)
    streams[:, Stream.TARGET] += planes.data_ptr()
    parts = placed(sections.parts[: len(chunks)], addresses)
    parts[coded[:, 0], Part.PLANE + coded[:, 1]] = streams[:, Stream.TARGET]
    frames = [frame_row(jobs[number], looked.fields(number)) for number in members]

    frame_table = tables.put(np.array(frames, np.int64).reshape(-1, int(Field.N)))
    chunk_table, stream_table = tables.put(parts), tables.put(streams)
    copy_work = [(key, tables.put(work), len(work)) for key, work in copies(jobs, chunks, addresses)]
    cast_work = [(key, tables.put(work), len(work)) for key, work in casts(jobs, chunks).items()]
    plane_work = [(key, tables.put(work), len(work)) for key, work in plane_programs(streams, kinds, n_each)]
    coded_work = [(key, tables.put(work), len(work)) for key, work in programs(jobs, chunks, rows_of, n_each).items()]
    places = addresses + sections.patches[: len(chunks)]
    patch_work = [(key, tables.put(work), len(work)) for key, work in patches(jobs, chunks, places).items()]
    tables.send()

    def view(place: int) -> torch.Tensor:
        return tables.view(place, torch.int64)

    for unit, place, n in copy_work:
        device.launch(copy_kernel, (n,), view(place), U=unit, BLOCK=_BLOCK)
    for (from_w, from_m, w, m), place, n in cast_work:
        device.launch(cast_kernel, (n,), view(place), FROM_W=from_w, FROM_M=from_m, W=w, M=m, BLOCK=_BLOCK)
    for (width, prob_bits), place, n in plane_work:
        device.launch(plane_kernel, (n,), view(place), view(stream_table), told, WIDTH=width, P=prob_bits, C=n_each)
    for (kind, flow, is_long), place, n in coded_work:
        arguments = view(place), view(frame_table), view(chunk_table), told
        constants = {**kind.constants(), **flow.constants(), "IS_LONG": int(is_long)}
        device.launch(decode_kernel, (n,), *arguments, **constants, C=n_each)
    for width, place, n in patch_work:
        device.launch(patch_kernel, (n,), view(place), told, W=width, BLOCK=_BLOCK)
    return [planes, sides, tables]


__all__ = ["Checksums", "DeviceDecodeJob", "Pending", "checksums_of", "decode"]
