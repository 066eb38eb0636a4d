"""One device as the launchers see it: memory, uploads, pinned host memory, events, launches. Imports torch and ground.

The hard thing: a kernel that is launched runs later. What it reads must live until then, host memory that is copied
from must not change before, and all of it belongs to the device of the tensors and to the stream that is current.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch

from tricomp.dtypes import by_name
from tricomp.errors import BackendError, OutOfDeviceMemory
from tricomp.layout import DeviceArray

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_ALIGN = 256
_interpreter = Lock()
_CARRIERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # torch's unsigned ones can do little


def gpu_names() -> list[str]:
    """The accelerators that torch can use, by name."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def current_device() -> torch.device:
    """The GPU that is current; under the interpreter the CPU."""
    return torch.device("cpu") if IS_INTERPRETED else torch.device("cuda", torch.cuda.current_device())


def place_of(name: str) -> torch.device:
    """The torch device of a name. Raises BackendError."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        raise BackendError(f"device {name!r} is none of torch's: {text} Load to the host, and copy.") from None


def from_dlpack(array: Any) -> DeviceArray:
    """The DeviceArray that shares the memory of an array of another framework, JAX say. Raises UnsupportedDtype."""
    tensor = torch.utils.dlpack.from_dlpack(array).contiguous()
    dtype = by_name(str(tensor.dtype).removeprefix("torch."))
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return DeviceArray(dtype, tuple(tensor.shape), plain.reshape(-1).view(_CARRIERS[plain.element_size()]))


class HostCopy:
    """What a device is copying to the host; to be read after an event that was made later."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def array(self) -> np.ndarray[Any, Any]:
        """The copy, which shares the tensor's memory."""
        return self._tensor.numpy()


class _Nothing:
    """An event of a device that does everything at once."""

    def wait(self) -> None: ...


class _Event:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self._event.synchronize()


@dataclass(frozen=True)
class Device:
    """A torch device, and how wide kernels run on it.

    chunks_a_program, warps: 8 and 4, two chunks a warp, see tests/benchmarks/results. The interpreter's cost is by
    operation, however wide, so there programs are wide.
    """

    handle: torch.device
    chunks_a_program: int = field(default_factory=lambda: 32 if IS_INTERPRETED else 8)
    warps: int = 4
    survey_rows: int = field(default_factory=lambda: 32 if IS_INTERPRETED else 8)

    stream: Any = None  # a torch.cuda.Stream; None: the current one
    caller: Any = None  # the stream that was current when the one above was taken

    @property
    def is_accelerator(self) -> bool:
        return self.handle.type == "cuda"

    def after_current(self) -> Device:
        """The same with a stream of its own, which goes on after all that the current one has been given."""
        if not self.is_accelerator:
            return self
        stream, caller = _side_stream(self.handle), torch.cuda.current_stream(self.handle)
        stream.wait_stream(caller)
        return replace(self, stream=stream, caller=caller)

    def given(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of this device's stream for the caller's, which waits for what makes it and may outlive it."""
        if self.caller is not None:
            self.caller.wait_stream(self.stream)
            tensor.record_stream(self.caller)
        return tensor

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is launched and allocated inside belongs to this device and its stream. Raises OutOfDeviceMemory."""
        if not self.is_accelerator:
            yield
            return
        try:
            with torch.cuda.device(self.handle), torch.cuda.stream(self.stream):
                yield
        except torch.OutOfMemoryError as error:
            raise self._short("what coding needs", error) from None

    def adopted(self, words: Any, align: int) -> torch.Tensor:
        """Words as a contiguous int tensor on this device at a multiple of align bytes; copied only if they must be.

        words: an int tensor [n] on any device, or uint[n] of numpy.
        """
        if isinstance(words, np.ndarray):
            if self.is_accelerator:
                with self.running():
                    return self.to_device(np.ascontiguousarray(words).view(np.uint8)).view(_CARRIERS[words.itemsize])
            room = self._room(words.nbytes, words.itemsize, align)
            room.numpy().view(words.dtype)[:] = words
            return room
        if words.device == self.handle and words.is_contiguous() and words.data_ptr() % align == 0:
            tensor: torch.Tensor = words
            return tensor
        with self.running():
            room = self._room(words.nbytes, words.element_size(), align)
            return room.copy_(words, non_blocking=True)

    def target(self, given: Any, n_words: int, item_bytes: int) -> torch.Tensor:
        """Where words are decoded to: the tensor given, if it is one of this device, else fresh memory."""
        if isinstance(given, torch.Tensor) and given.device == self.handle:
            return given
        with self.running():
            return self.empty(n_words, _CARRIERS[item_bytes])

    def joined(self, parts: Sequence[torch.Tensor], align: int) -> torch.Tensor:
        """Int tensors of this device one after the other; the only one as it is."""
        if len(parts) == 1:
            return parts[0]
        with self.running():
            n_bytes = sum(part.nbytes for part in parts)
            room = self._room(n_bytes, parts[0].element_size(), align)
            return torch.cat(list(parts), out=room)

    def _room(self, n_bytes: int, item_bytes: int, align: int) -> torch.Tensor:
        """An int tensor of so many bytes at a multiple of align."""
        room = self.empty(n_bytes + align, torch.uint8)
        first = -room.data_ptr() % align
        return room[first : first + n_bytes].view(_CARRIERS[item_bytes])

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device. Raises OutOfDeviceMemory."""
        try:
            return torch.empty(shape, dtype=dtype, device=self.handle)
        except torch.OutOfMemoryError as error:
            raise self._short(f"{shape} of {dtype}", error) from None

    def _short(self, what: str, error: torch.OutOfMemoryError) -> OutOfDeviceMemory:
        return OutOfDeviceMemory(
            f"{self.handle}: no memory for {what}: {str(error).partition(chr(10))[0]} Give tricomp a smaller budget of "
            f"device memory, or let it encode on the host (backend='native'). Nothing was saved; training can go on."
        )

    def zeros(self, shape: int | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The same, filled with zeros."""
        return self.empty(shape, dtype).zero_()

    def to_host(self, tensor: torch.Tensor, wait: bool = False) -> HostCopy:
        """Start copying to pinned memory, which torch keeps for the next time.

        wait: until it is done; and what is on the host is copied too.
        """
        if not self.is_accelerator:
            found = tensor.cpu()
            return HostCopy(found.clone() if wait and found is tensor else found)
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        target.copy_(tensor, non_blocking=not wait)
        return HostCopy(target)

    def to_device(self, octets: np.ndarray[Any, Any]) -> torch.Tensor:
        """Copy host memory to the device, in order with what is launched. octets: uint8[n].

        Raises OutOfDeviceMemory.
        """
        if not self.is_accelerator:
            return torch.from_numpy(octets)
        staged = torch.empty(len(octets), dtype=torch.uint8, pin_memory=True)
        staged.numpy()[:] = octets
        target = self.empty(len(octets), torch.uint8)
        target.copy_(staged, non_blocking=True)
        return target

    def fetch(self, tensor: torch.Tensor) -> tuple[HostCopy, _Nothing | _Event]:
        """Start copying what is complete, beside what runs. The tensor must live until the event that comes with it."""
        if not self.is_accelerator:
            return self.to_host(tensor), self.event()
        with torch.cuda.stream(_copy_stream(self.handle)):
            return self.to_host(tensor), self.event()

    def event(self) -> _Nothing | _Event:
        """Something to wait for: all that was launched so far."""
        return _Event(self.handle) if self.is_accelerator else _Nothing()

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch a kernel on the device's current stream; inside `running`. Grids of no programs are left out.

        Raises BackendError where it cannot be compiled or launched.
        """
        if 0 in grid:
            return
        if not self.is_accelerator:
            with _interpreter:  # it replaces parts of Triton while it runs
                kernel[grid](*arguments, **constants)
            return
        try:
            kernel[grid](*arguments, **constants, num_warps=self.warps, enable_fp_fusion=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's compiler, a C compiler that is missing, the driver: each has its own
            first = next(iter(str(error).strip().splitlines()), "")
            raise BackendError(
                f"{self.handle}: the kernel {kernel.__name__} does not run here: {type(error).__name__}: {first} "
                f"Triton needs a C compiler (CC) and a driver that fits it; backend='native' does without."
            ) from error


@cache
def _side_stream(handle: torch.device) -> Any:
    """One stream a device: what is encoded at the same time there would only wait for each other's memory."""
    return torch.cuda.Stream(handle)  # type: ignore[no-untyped-call]


@cache
def _copy_stream(handle: torch.device) -> Any:
    """One more, for what goes to the host while kernels run."""
    return torch.cuda.Stream(handle)  # type: ignore[no-untyped-call]


class Upload:
    """Arrays that go to the device in one transfer. Put them all, send, then ask for addresses and views.

    Where some hold addresses of others: allocate before you send, ask, and fill them in.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._parts: list[np.ndarray[Any, Any]] = []
        self._begins: list[int] = []
        self._n_bytes = 0
        self._memory: torch.Tensor | None = None

    def put(self, array: np.ndarray[Any, Any]) -> int:
        """Take an array, which is read when all is sent. Returns its place, for `address` and `view`."""
        self._begins.append(self._n_bytes)
        self._parts.append(np.ascontiguousarray(array))
        self._n_bytes += -(-max(array.nbytes, 1) // _ALIGN) * _ALIGN
        return len(self._parts) - 1

    def allocate(self) -> None:
        """Take memory for all that was put. Raises OutOfDeviceMemory."""
        self._memory = self._device.empty(self._n_bytes, torch.uint8)

    def send(self) -> None:
        """Start the transfer. Raises OutOfDeviceMemory."""
        if self._memory is None:
            self.allocate()
        assert self._memory is not None
        staged = torch.zeros(self._n_bytes, dtype=torch.uint8, pin_memory=self._device.is_accelerator)
        octets = staged.numpy()
        for begin, part in zip(self._begins, self._parts, strict=True):
            octets[begin : begin + part.nbytes] = part.reshape(-1).view(np.uint8)
        self._memory.copy_(staged, non_blocking=True)

    def address(self, place: int) -> int:
        """Of an array on the device."""
        assert self._memory is not None
        return self._memory.data_ptr() + self._begins[place]

    def view(self, place: int, dtype: torch.dtype) -> torch.Tensor:
        """An array on the device, flat."""
        assert self._memory is not None
        begin = self._begins[place]
        return self._memory[begin : begin + self._parts[place].nbytes].view(dtype)
