"""Plans of frames whose words are on a device, from what kernels tell of them. Imports the kernels: see accelerator.

Kernels survey and gather, and the native planner decides on the host. The hard thing: a device idles while the host
waits and thinks. So all that planning always asks for is launched at once, what it asks for besides at once too, and
the host waits for each of the two, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tricomp.dtypes import DType, Words
from tricomp.job import EncodeJob, Facts, Gathered, Lattice
from tricomp.kernels.device import Device
from tricomp.kernels.survey import Lookup, Request, Surveyed, gather, survey
from tricomp.native.planner_gathered import lattices, plan_gathered, wanted
from tricomp.plan import Spec

FrameToPlan = tuple[Any, Any, DType, Sequence[int] | None, Spec, int | None]
"""As the engine has it, with int tensors for words."""


class Planning:
    """Frames being planned. Their words and references are on the device, as its kernels take them."""

    def __init__(self, frames: Sequence[FrameToPlan], device: Device, threads: int) -> None:
        self._frames, self._device, self._threads = frames, device, threads
        self._lattices = [
            tuple(lattices(len(words), dtype, shape, reference is not None))
            for words, reference, dtype, shape, *_ in frames
        ]
        with device.running():
            self._surveyed = survey([Request(words, old) for words, old, *_ in frames], device)
            self._gathering = _Gathering(frames, self._lattices, device)

    def result(self) -> list[EncodeJob]:
        """Wait, ask for what these frames need besides, wait for that, and plan."""
        told = self._gathering.result()  # which was launched last: so the survey is done too
        found = self._surveyed.result()
        gathered = [
            _gathered(frame, one, places, *some)
            for frame, one, places, some in zip(self._frames, found, self._lattices, told, strict=True)
        ]
        gathered = self._with_wanted(gathered)
        return [
            EncodeJob(
                plan,
                side,
                words,
                reference if plan.reference == "parent" else None,
                digest_sum=one.digest_sum,
                reference_sum=one.reference_sum if plan.reference == "parent" else None,
            )
            for (plan, side), (words, reference, *_), one in zip(
                plan_gathered(gathered, self._threads), self._frames, found, strict=True
            )
        ]

    def _with_wanted(self, gathered: Sequence[Gathered]) -> list[Gathered]:
        """The same with what the planner wants besides, now that it knows as much: of most frames nothing."""
        more = wanted(gathered, self._threads, has_means=True)
        counted = [i for i, one in enumerate(more) if one.commonest is not None]
        places = [one.lattices for one in more]
        if not counted and not any(places):
            return list(gathered)
        with self._device.running():
            counting = survey([Request(self._frames[i][0], like=more[i].commonest) for i in counted], self._device)
            told = _Gathering(self._frames, places, self._device).result()
        found = [one.extended(asked, *some) for one, asked, some in zip(gathered, places, told, strict=True)]
        for i, one in zip(counted, counting.result(), strict=True):
            found[i] = replace(found[i], n_unlike_commonest=one.n_unlike)
        return found


class _Gathering:
    """What lattices want of the words of each frame, and of its reference, on its way to the host."""

    def __init__(self, frames: Sequence[FrameToPlan], lattices: Sequence[Sequence[Lattice]], device: Device) -> None:
        self._lattices = lattices
        self._has_reference = [frame[1] is not None for frame in frames]
        lookups = [
            Lookup(held, one.rows, one.columns, one.n_columns, dtype if one.is_mean else None)
            for mine, (words, reference, dtype, *_) in zip(lattices, frames, strict=True)
            for one in mine
            for held in ((words, reference) if one.has_reference else (words,))
        ]
        self._pending = gather(lookups, device)

    def result(self) -> list[tuple[list[Words], list[Words | None] | None]]:
        """Wait. Of each frame what was gathered of its words and of its reference, None where it has none."""
        told = iter(self._pending.result())
        found = []
        for mine, has_reference in zip(self._lattices, self._has_reference, strict=True):
            pairs = [(next(told), next(told) if one.has_reference else None) for one in mine]
            found.append(([some for some, _ in pairs], [some for _, some in pairs] if has_reference else None))
        return found


def _gathered(
    frame: FrameToPlan, found: Surveyed, places: Sequence[Lattice], words: Sequence[Words], reference: Any
) -> Gathered:
    """What is known of a frame at first. Where facts decide, what was gathered is left out."""
    has_reference = frame[1] is not None
    facts = Facts(found.like, found.n_unlike, found.n_unlike_reference if has_reference else None, found.joined)
    if facts.is_exact:
        places, words, reference = (), (), () if has_reference else None
    return Gathered(len(frame[0]), *frame[2:], facts, places, words, reference)
