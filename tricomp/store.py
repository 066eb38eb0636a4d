"""The checkpoints of a run in one folder: storage, chain, container and codec put together.

There is no manifest: the files are the truth, and chains are found from their headers and tails. The hard thing: a
delta is only ever written against a checkpoint that is committed, and nothing that something else needs is removed.
"""

from __future__ import annotations

import logging
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, Literal, TypeVar

import numpy as np

from tricomp import codec, storage
from tricomp.bucket import Bucket
from tricomp.cache import Cache
from tricomp.chain import Keep, KeyframeEvery, Link, ReferenceChoice, chains, nearest, next_parent, to_prune
from tricomp.checkpoint import put
from tricomp.content import Content, content_of
from tricomp.errors import (
    CorruptFile,
    CorruptFrame,
    InvalidArgument,
    MissingParent,
    MissingStep,
    OutOfDeviceMemory,
    StorageError,
    TricompError,
    UnsupportedVersion,
)
from tricomp.file import File
from tricomp.lease import LEASE_SECONDS
from tricomp.plan import Spec, check_spec
from tricomp.progress import OnBytes
from tricomp.report import Report, VerifyReport
from tricomp.steps import STEP_NAME, Steps, file_name, number_of
from tricomp.verification import verify_steps

_log = logging.getLogger("tricomp")
Result = TypeVar("Result")


class Store:
    """The checkpoints of one training run, in a local folder or a bucket, one file a step.

    url: a folder, made by the first save; or, as str, any URL that fsspec knows ("s3://bucket/run"): tricomp/bucket.py
    tells what is promised there. storage_options: for fsspec. cache: a local folder where files of the bucket that
    others are coded against are kept, up to cache_bytes; None: they are read from the bucket each time, leaf by leaf.
    keyframe: how often a checkpoint stands alone. keep: retention policies; when
    there are any, each save prunes what none of them wants and nothing kept needs; the step just saved is never pruned.
    reference: code against the previous checkpoint (smallest) or the last keyframe (loads faster).
    spec: how to encode. reference_in: keep a copy of the last saved words in host memory, as much as the state, or
    decode them from the store at the next save, batch by batch ("store": no memory held between saves). threads,
    backend: to encode and decode with, see tricomp.open.

    The next checkpoint is coded against the one that this Store last saved or loaded, else against the nearest lower
    step. So after load(1000) of a run that went on to 1500, save(1010) continues from 1000; steps above stay where they
    are, latest() still names the highest, and rewind(1000) takes those away that the run no longer stands for.

    One writer at a time: the first save, prune, rebase or remove locks the folder until close() or the end of the
    process, however it ends; a second writer gets StoreLocked. tricomp/folder.py tells of network file systems. In a
    bucket the lock is an object that a writer renews; one on another host that was not renewed for lease seconds may
    be taken over. Reading needs neither lock nor write permission.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        keyframe: KeyframeEvery = KeyframeEvery(10),  # noqa: B008 - it is frozen
        keep: Sequence[Keep] = (),
        reference: ReferenceChoice = "previous",
        spec: Spec | None = None,
        reference_in: Literal["device", "host", "store"] = "host",
        *,
        storage_options: Mapping[str, Any] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = 16 << 30,
        lease: float = LEASE_SECONDS,
        threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        self._engine = codec.Engine(threads, backend)
        if reference not in ("previous", "keyframe"):
            raise InvalidArgument(f"Store: reference is 'previous' or 'keyframe', not {reference!r}.")
        if reference_in not in ("device", "host", "store"):
            raise InvalidArgument(f"Store: reference_in is 'device', 'host' or 'store', not {reference_in!r}.")
        if not isinstance(keyframe, KeyframeEvery):
            raise InvalidArgument(f"Store: keyframe: expected a tricomp.KeyframeEvery, got {keyframe!r}.")
        if not isinstance(keep, Sequence) or not all(callable(getattr(policy, "kept", None)) for policy in keep):
            raise InvalidArgument(f"Store: keep: expected a list of policies, say [tricomp.KeepLast(3)], got {keep!r}.")
        check_spec(spec)
        if not isinstance(lease, int | float) or isinstance(lease, bool) or not lease > 0:
            raise InvalidArgument(f"Store: lease: expected seconds, above 0, got {lease!r}.")
        copies = None if cache is None else Cache(cache, cache_bytes)
        self._folder = storage.at(url, storage_options, copies, lease)
        self._bucket = self._folder if isinstance(self._folder, Bucket) else None
        self._steps = Steps(self._folder, threads, backend)
        self._keyframe, self._keep, self._reference = keyframe, tuple(keep), reference
        self._spec, self._reference_in = spec, reference_in
        self._lock: storage.Lock | None = None
        self._previous: int | None = None
        self._held: Content | None = None

    @property
    def url(self) -> str:
        """The folder, as given."""
        return self._folder.url

    def steps(self) -> list[int]:
        """All steps that have a file, ascending, whether or not they can be loaded.

        In a bucket, what has no sound end is no file of a step: a writer may have died there, or be at work.
        """
        return sorted(self._steps.seen(self._steps.files()))

    def latest(self) -> int | None:
        """The highest step, or None."""
        return self._steps.highest(self._steps.files())

    def save(
        self,
        step: int,
        tree: Any,
        metadata: dict[str, Any] | None = None,
        overwrite: bool = False,
        first: codec.First | None = None,
        is_lasting: bool = False,
    ) -> Report:
        """Write a checkpoint; when this returns it is durable, and until then every other one is as it was.

        step: from 0. One that is there is refused unless overwrite=True; those coded against it are then rebased first.
        first: leaves to encode before all others, see codec.First. is_lasting: arrays of the tree will not change while
        `holds` tells so of one of them: on the host they are then held for the next save as they are, not copied.
        Raises InvalidArgument, UnsupportedNode, UnsupportedDtype, StorageError, StoreLocked.
        """
        step = step_number(step)
        self._write_lock()
        if not overwrite:
            self.require_new(step)
        content = content_of(tree)
        if overwrite and step in self.steps():
            self._rebase_children([step])
        links = {link.step: link for link in self._steps.links() if link.step != step}
        lower = max((other for other in links if other < step), default=None)
        previous = self._previous if self._previous in links else lower
        parent = next_parent(links.values(), previous, self._keyframe, self._reference)
        since_keyframe = links[previous].since_keyframe + 1 if parent is not None and previous is not None else 0
        report = self._put(step, content, parent, metadata, since_keyframe, first)
        self._previous = step
        if parent is None or self._reference == "previous":
            self._hold(content, report, is_lasting)
        if step < max(links, default=step):
            _log.warning("%s: saved step %d below step %d, which stays the latest", self.url, step, max(links))
        try:
            self._prune()
        except StorageError as error:
            _log.warning("step %d is saved, but older ones could not be removed: %s", step, error)
        return report

    def load(self, step: int | None = None, leaves: Iterable[str] | None = None) -> Any:
        """The tree of a step (None: the latest); or, given leaves (paths or fnmatch patterns), a dict of path to array.

        Raises MissingStep, MissingParent, CorruptFile, CorruptFrame: naming the nearest step that can be loaded.
        """
        return self.read(step, lambda file: file.load(leaves))

    def read(self, step: int | None, action: Callable[[File], Result], is_checked: bool = False) -> Result:
        """What action makes of the File of a step (None: the latest): the next save then continues from that step.

        is_checked: if all is in a local folder, the checksums of the whole chain are compared before; files of a bucket
        would come twice. Raises what load raises, and what action raises.
        """
        with self.open(step) as file:
            number = number_of(file)
            if is_checked and self._bucket is None:
                self._advised(number, lambda: check_all(file))
            result: Result = self._advised(number, lambda: action(file))
        self._previous = number
        return result

    def open(self, step: int | None = None) -> File:
        """The checkpoint of a step (None: the latest) as a File that decodes leaves when asked. Raises as load does."""
        files = self._steps.files()
        if step is None:
            step = self._steps.highest(files)
            if step is None:
                raise MissingStep(f"there are no checkpoints in {self.url}. Save one first, or check the path.")
        step = step_number(step)
        if step not in files or not self._steps.seen({step: files[step]}):
            other = nearest(self._steps.seen(files), step)
            advice = "It has no checkpoints." if other is None else f"The nearest is step {other}."
            raise MissingStep(f"step {step} is not in {self.url}. {advice}")
        file: File = self._advised(step, lambda: self._steps.open(step, files))
        return file

    def open_alone(self, step: int, reference: File | None = None) -> File:
        """The file of a step without the chain behind it: for its facts, or against a parent that is open already.

        Raises MissingStep, CorruptFile, WrongReference and the like.
        """
        return self._steps.open_alone(step_number(step), reference)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was given to save as metadata of a step: much quicker than by opening it. Raises as open_alone does."""
        return self._steps.summary(step_number(step)).metadata

    def continue_from(self, step: int) -> None:
        """Let the next save be coded against this step, as load does; for who read it by open. Raises MissingStep."""
        step = step_number(step)
        if step not in self.steps():
            raise MissingStep(f"step {step} is not in {self.url}, so no save can continue from it. See steps().")
        self._previous = step

    def verify(self, on_progress: OnBytes | None = None) -> VerifyReport:
        """Decode every leaf of every step and compare checksums and digests. Damage is reported, never raised.

        A few pieces are in memory at a time. on_progress: told the bytes of each. Raises LimitExceeded, StorageError.
        """
        return verify_steps(self._steps, on_progress)

    def prune(self) -> tuple[int, ...]:
        """Remove the steps that no policy wants and nothing kept needs, and return them; without policies, none.

        Steps that cannot be loaded do not count and are left alone. Raises StorageError, StoreLocked.
        """
        self._write_lock()
        return self._prune()

    def require_new(self, step: int) -> None:
        """Raise InvalidArgument if step is here already, as save would."""
        if step_number(step) in self.steps():
            raise InvalidArgument(
                f"step {step} is already in {self.url}. Save a higher step, or pass overwrite=True to replace it. "
                "If the run went back to an earlier step, take the later ones away with Store.rewind(step)."
            )

    def claim(self) -> None:
        """Keep other writers out from now on, as the first save does. Raises StoreLocked, StorageError."""
        self._write_lock()

    def rebase(self, step: int) -> Report:
        """Write a step again so that it stands alone. Its content id stays, so its children still find it.

        Raises MissingStep, MissingParent, CorruptFile, CorruptFrame, StorageError, StoreLocked.
        """
        self._write_lock()
        with self.open(step) as file:
            content = self._advised(number_of(file), file.content)
            metadata = file.metadata
        return self._write(step_number(step), content, None, metadata, spec=self._lossless())

    def remove(self, *steps: int) -> None:
        """Remove steps; those that stay and were coded against one of them are rebased first.

        Raises MissingStep, StorageError, StoreLocked, and what rebase raises.
        """
        self._write_lock()
        gone = [step_number(step) for step in steps]
        there = self.steps()
        for step in gone:
            if step not in there:
                raise MissingStep(f"step {step} is not in {self.url}: nothing was removed.")
        self._rebase_children(gone)
        for step in gone:
            self._folder.delete(file_name(step))

    def rewind(self, step: int) -> tuple[int, ...]:
        """Go back to a step: remove those above it, and return them; the next save continues from it.

        Raises MissingStep, StorageError, StoreLocked.
        """
        step = step_number(step)
        there = self.steps()
        gone = tuple(other for other in there if other > step)
        self.remove(*(gone if step in there else (step,)))
        self._previous = step
        return gone

    def close(self) -> None:
        """Let the next writer in, and free the copy of the last saved words. The Store can be used again."""
        self._held = None
        self.unlock()

    def unlock(self) -> None:
        """Let the next writer in, and keep the copy of the last saved words for a save that comes after it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<tricomp.Store {self.url}>"

    def _write_lock(self) -> None:
        if self._lock is not None and self._lock.is_held:
            self._lock.refresh()
            return
        self._lock = self._folder.lock()
        if self._bucket is not None:
            self._bucket.tidy(lambda name: STEP_NAME.fullmatch(name) is not None)

    def _advised(self, step: int, action: Callable[[], Any]) -> Any:
        """The result of action; if the step turns out broken, the error also names the step to load instead."""
        try:
            return action()
        except (CorruptFile, CorruptFrame, MissingParent, UnsupportedVersion) as error:
            rest = [other for other in chains(self._steps.links()) if other != step]
            while (other := nearest(rest, step)) is not None and not self._is_sound(other):
                rest.remove(other)
            advice = "No other step can be loaded." if other is None else f"Load step {other}, the nearest intact one."
            told = str(error) if str(error).startswith(f"step {step} of ") else f"step {step}: {error}"
            advised = type(error)(f"{told} {advice}")
            for note in getattr(error, "__notes__", ()):
                advised.add_note(note)
            raise advised from error

    def _is_sound(self, step: int) -> bool:
        """Whether all checksums along the chain of a step hold."""
        try:
            for link in chains(self._steps.links())[step]:
                source = self._folder.get(file_name(link.step))
                with File(source) as file:
                    file.check()
        except (TricompError, OSError):
            return False
        return True

    def _put(
        self,
        step: int,
        content: Content,
        parent: Link | None,
        metadata: dict[str, Any] | None,
        since_keyframe: int,
        first: codec.First | None,
    ) -> Report:
        """Write a step against its parent: the words in memory if they are the parent's, else those in the store."""
        if parent is None:
            return self._write(step, content, None, metadata, first=first)
        if self._held is not None and self._held.content_id == parent.content_id.hex():
            return self._write(step, content, self._held, metadata, since_keyframe, first=first)
        self._held = None
        told = Event()
        if first is not None and first.when_done is not None:
            first = replace(first, when_done=partial(_tell, told, first.when_done))
        try:
            with self._steps.open(parent.step, is_reference=True) as file:
                return self._write(step, content, self._base_of(file, first), metadata, since_keyframe, first=first)
        except (CorruptFile, CorruptFrame, MissingStep) as error:
            if told.is_set() and first is not None and first.paths:  # they may have changed since they were encoded
                raise
            _log.warning("step %d stands alone, since step %d cannot be read: %s", step, parent.step, error)
            return self._write(step, content, None, metadata, first=first)

    def _base_of(self, file: File, first: codec.First | None) -> File | Content:
        """What to code against: the parent's file, whose words are decoded batch by batch when they are needed.

        If somebody waits for leaves to be encoded, so that they may change, damage must be known before.
        """
        if first is not None and first.paths:
            if self._bucket is None:
                check_all(file)
            elif self._reference_in != "store":
                return file.content()
        return file

    def _write(
        self,
        step: int,
        content: Content,
        base: File | Content | None,
        metadata: dict[str, Any] | None,
        since_keyframe: int = 0,
        spec: Spec | None = None,
        first: codec.First | None = None,
    ) -> Report:
        """Write a step against what is given. spec: None: the store's."""
        spec, engine = spec or self._spec, self._engine
        return put(self._folder, file_name(step), content, base, spec, metadata, since_keyframe, engine, first=first)

    def holds(self, is_mine: Callable[[Any], bool]) -> bool:
        """Whether some of the words that are held for the next save are such. is_mine: told of words as they stand."""
        return self._held is not None and any(map(is_mine, self._held.snapshot.buffers))

    def _hold(self, content: Content, report: Report, is_lasting: bool) -> None:
        """Keep what was saved, rounded where spec rounds: if it is what a reader of the file decodes."""
        self._held = None
        if self._reference_in == "store":
            return
        is_rounded = self._spec is not None and bool(self._spec.keep_mantissa_bits)
        if is_lasting and not is_rounded and all(isinstance(words, np.ndarray) for words in content.snapshot.buffers):
            self._held = Content(content.structure, content.snapshot)
            vars(self._held)["content_id"] = report.content_id  # not told again from the words
            return
        try:
            snapshot = codec.bounded(content.snapshot, self._spec or Spec())
            snapshot = codec.copied(snapshot, to_host=self._reference_in == "host")
        except OutOfDeviceMemory as error:  # the step is in the store, from where the next one can take it
            _log.warning("this step is not held for the next one to be coded against: %s", error)
            return
        held = Content(content.structure, snapshot)
        self._held = held if held.content_id == report.content_id else None

    def _prune(self) -> tuple[int, ...]:
        protected = () if self._previous is None else (self._previous,)
        steps = to_prune(self._steps.links(), self._keep, protected)
        for step in reversed(steps):  # deltas before what they need
            self._folder.delete(file_name(step))
        return steps

    def _rebase_children(self, gone: Sequence[int]) -> None:
        """Make those steps stand alone that stay and would lose a link of their chain; broken ones are lost already."""
        broken: set[int] = set()
        while True:
            links = self._steps.links()
            before, after = chains(links), chains([link for link in links if link.step not in gone])
            lost = [step for step in sorted(before) if step not in after and step not in gone and step not in broken]
            if not lost:
                return
            try:
                self.rebase(lost[0])
            except (CorruptFile, CorruptFrame) as error:
                _log.warning("step %d cannot be rebased: %s", lost[0], error)
                broken.add(lost[0])

    def _lossless(self) -> Spec | None:
        """The spec without its rounding: a rebased step decodes to what it was."""
        return None if self._spec is None else Spec(tier=self._spec.tier, chunk_log2=self._spec.chunk_log2)


def _tell(told: Event, when_done: Callable[[], None]) -> None:
    told.set()
    when_done()


def check_all(file: File) -> None:
    """Compare the checksums of a file, and of those it was coded against. Raises CorruptFrame."""
    for one in file.chain():
        one.check()


def step_number(step: Any) -> int:
    """The step as an int, of whatever integer type it is. Raises InvalidArgument."""
    try:
        number = operator.index(step)
    except TypeError:
        raise InvalidArgument(f"step: expected an integer, got {reprlib.repr(step)[:80]}.") from None
    if isinstance(step, bool) or not 0 <= number < 10**18:
        raise InvalidArgument(f"step: expected an integer from 0 to 10^18 - 1, got {step!r}.")
    return number


def count_of(value: Any, what: str) -> int:
    """A number from 1 on, of whatever integer type it is. Raises InvalidArgument that begins with what."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise InvalidArgument(f"{what}, 1 or more, got {value!r}.")
    return operator.index(value)
