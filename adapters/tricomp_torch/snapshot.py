"""snapshot: a tree's tensors copied to fresh memory where they live, so that training goes on while they are saved.

Imports torch and the adapter's trees. One flat buffer a device and width of elements holds all copies, each at a
multiple of 16 bytes, so that kernels read them as they lie. The hard thing is order: copies wait for what was launched
before, what is launched later waits for the copies, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from threading import Event
from typing import Any

import torch

from tricomp import dtypes
from tricomp import tree as plain_trees
from tricomp.codec import First
from tricomp.errors import InvalidArgument, OutOfDeviceMemory
from tricomp.host_memory import HostBuffer
from tricomp.layout import DeviceArray
from tricomp_torch.tensors import Array
from tricomp_torch.trees import Flat, flatten

_ALIGN = 16


@dataclass(frozen=True)
class Snapshot:
    """A tree as it was at one moment. Give it to `tricomp_torch.save` in place of the tree, as often as you like.

    structure, leaves: the tree as the core takes it, see tricomp.tree; notes: those of flatten. copied_bytes: how much
    was copied. live: paths of tensors that the budget had no room for: they are still the caller's own, and must not
    change before `wait_live` returns: save encodes them before all others.
    """

    structure: bytes
    leaves: tuple[Any, ...]
    notes: Mapping[str, Any]
    copied_bytes: int
    live: tuple[str, ...] = ()
    _freed: Event = field(default_factory=Event, repr=False)
    _copied: tuple[tuple[torch.device, torch.cuda.Event], ...] = field(default=(), repr=False)

    @cached_property
    def flat(self) -> Flat:
        """What flatten gives, of the copies. Put together when asked for: training need not wait for that."""
        return Flat(plain_trees.unflatten(self.structure, self.leaves), dict(self.notes))

    def before_update(self) -> None:
        """Let what is launched from now on wait for the copies, on each device: only after snapshot(defer=True)."""
        for device, event in self._copied:
            torch.cuda.current_stream(device).wait_event(event)

    @contextmanager
    def saving(self) -> Iterator[First]:
        """What a save encodes first. Whoever waits for the live tensors goes on at the end, however it ends."""
        try:
            yield First(self.live, self._freed.set)
        finally:
            self._freed.set()

    def wait_live(self, timeout: float | None = None) -> bool:
        """Let the host wait until a save, in another thread, has encoded the live tensors, or has failed.

        timeout: in seconds. Returns whether that is so; at once where nothing is live.
        """
        return not self.live or self._freed.wait(timeout)

    def wait(self) -> None:
        """Let the host wait for the copies."""
        for _, event in self._copied:
            event.synchronize()


@dataclass
class _Copies:
    """What goes to the flat buffer of one device and carrier dtype: tensors, and the element at which each begins."""

    sources: list[torch.Tensor] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    n_elements: int = 0

    def add(self, words: torch.Tensor) -> int:
        """Take a tensor. Returns its number among the others."""
        self.sources.append(words)
        self.begins.append(self.n_elements)
        step = _ALIGN // words.element_size()
        self.n_elements += -(-len(words) // step) * step
        return len(self.sources) - 1

    def copied(self, device: torch.device) -> list[torch.Tensor]:
        """Launch the copies on the current stream; where each is. Raises OutOfDeviceMemory."""
        try:
            buffer = torch.empty(self.n_elements, dtype=self.sources[0].dtype, device=device)
        except torch.OutOfMemoryError as error:
            n_bytes = self.n_elements * self.sources[0].element_size()
            raise OutOfDeviceMemory(
                f"{device}: no memory for a snapshot of {n_bytes} bytes: {str(error).partition(chr(10))[0]} "
                f"Give snapshot a budget_bytes. Nothing was saved; training can go on."
            ) from None
        views = [buffer[begin : begin + len(words)] for begin, words in zip(self.begins, self.sources, strict=True)]
        torch._foreach_copy_(views, self.sources, non_blocking=True)
        return views


def snapshot(
    tree: Any, *, budget_bytes: int | None = None, defer: bool = False, buffer: HostBuffer | None = None
) -> Snapshot:
    """Copy every tensor and array of a tree, each where it lives: those of a GPU to fresh memory of that GPU.

    The copies are made on a stream of their own, after all that the current stream has been given, and the current
    stream goes on after them; the host does not wait. budget_bytes: of fresh memory on each GPU; tensors it has no room
    for, in tree order, are left as they are, and saved first (see Snapshot.live). None: all are copied. defer: the
    current stream goes on at once, so that forward and backward passes run beside the copies; call `before_update`
    ahead of the next optimizer step. buffer: host memory for copies of what is there, kept from snapshot to snapshot;
    None: fresh. Raises what flatten raises; OutOfDeviceMemory, with nothing changed.

    >>> taken = tricomp_torch.snapshot({"model": model.state_dict(), "optimizer": opt.state_dict()})  # doctest: +SKIP
    >>> threading.Thread(target=tricomp_torch.save, args=(taken, "step7.tri")).start()  # doctest: +SKIP
    """
    if budget_bytes is not None and (isinstance(budget_bytes, bool) or budget_bytes < 0):
        raise InvalidArgument(f"budget_bytes: expected bytes, 0 or more, or None, got {budget_bytes!r}.")
    return snapshot_of(flatten(tree), budget_bytes, defer, buffer)


def snapshot_of(
    flat: Flat, budget_bytes: int | None = None, defer: bool = False, buffer: HostBuffer | None = None
) -> Snapshot:
    """What snapshot does, of a tree that is flattened already."""
    structure, paths, leaves = plain_trees.flatten(flat.tree)
    copies: dict[tuple[torch.device, torch.dtype], _Copies] = {}
    used: dict[torch.device, int] = {}
    known: dict[tuple[Any, ...], int] = {}  # tied leaves are copied once
    places: list[tuple[tuple[torch.device, torch.dtype], int] | None] = []
    live: list[str] = []
    for path, leaf in zip(paths, leaves, strict=True):
        places.append(None)
        if not isinstance(leaf, DeviceArray):
            dtypes.of(leaf, path)  # what holds objects is no memory to copy
            continue
        words = leaf.words
        key = (words.device, words.dtype)
        identity = (*key, words.data_ptr(), len(words))
        if identity not in known:
            n_bytes = used.get(words.device, 0) + words.nbytes
            if budget_bytes is not None and n_bytes > budget_bytes:
                live.append(path)
                continue
            used[words.device] = n_bytes
            known[identity] = copies.setdefault(key, _Copies()).add(words)
        places[-1] = key, known[identity]
    made, events = _launch(copies, defer)
    arrays = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if not isinstance(leaf, DeviceArray)}
    here = _host_copies(arrays, flat.notes.get("ties", {}), buffer or HostBuffer())
    done = [
        here[path]
        if not isinstance(leaf, DeviceArray)
        else leaf
        if place is None
        else replace(leaf, words=made[place[0]][place[1]])
        for path, leaf, place in zip(paths, leaves, places, strict=True)
    ]
    return Snapshot(structure, tuple(done), flat.notes, sum(used.values()), tuple(live), _copied=tuple(events))


def _host_copies(arrays: Mapping[str, Array], ties: Mapping[str, str], buffer: HostBuffer) -> dict[str, Array]:
    """Copies of arrays in a buffer, by path; of tied ones the same. ties: the path of the first by the others'."""
    alone = {path: array for path, array in arrays.items() if path not in ties}
    made = dict(zip(alone, buffer.copies(list(alone.values())), strict=True))
    return made | {path: made[first] for path, first in ties.items() if path in arrays}


def _launch(
    copies: Mapping[tuple[torch.device, torch.dtype], _Copies], defer: bool
) -> tuple[dict[tuple[torch.device, torch.dtype], list[torch.Tensor]], list[tuple[torch.device, torch.cuda.Event]]]:
    """Launch all copies, each device's on a stream of its own. Returns them, and an event a device."""
    made: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    events: list[tuple[torch.device, torch.cuda.Event]] = []
    for device in dict.fromkeys(device for device, _ in copies):
        mine = {key: part for key, part in copies.items() if key[0] == device}
        if device.type != "cuda":
            made.update((key, part.copied(device)) for key, part in mine.items())
            continue
        stream = _stream_of(device)
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            made.update((key, part.copied(device)) for key, part in mine.items())
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        for part in mine.values():
            for words in part.sources:
                words.record_stream(stream)  # the caller may let go of them before they are copied
        for key in mine:
            for view in made[key][:1]:
                view.record_stream(current)
        if not defer:
            current.wait_event(event)
        events.append((device, event))
    return made, events


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream that copies on a device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
