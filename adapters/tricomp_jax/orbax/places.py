"""Where Orbax puts items of steps, and the `.tri` files in them: `ROOT/STEP/ITEM/step-000000000012.tri`.

An item's folder is one that tricomp.Store and the command line can read. Beside its own file it may hold further names
(hard links) of the files that its own was coded against; else their steps must stay. The hard thing: while a step is
saved its folders have temporary names, which must be found in nothing that is written; and a folder is a step of
the run only if its name differs from this step's in the number alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from etils import epath  # type: ignore[import-untyped]
from orbax.checkpoint import utils

from tricomp import container, storage
from tricomp.errors import MissingFile, MissingParent, TricompError, WrongReference
from tricomp.file import File
from tricomp.steps import STEP_NAME, Steps, file_name
from tricomp_jax.files import notes_of

NOTE = "orbax"
"""Among the notes of a file: the step that has its parent ("parent") and the item's name ("item")."""

_STEP = re.compile(r"(.*?)(\d{1,18})", re.DOTALL)
_USUAL_STEP = re.compile(r"(.*_)?\d+", re.DOTALL)  # as Orbax names steps unless a NameFormat says otherwise


def path_of(folder: Any) -> Any:
    """A folder as the path that Orbax uses, whatever it is given as: also in a bucket."""
    return epath.Path(folder)


@dataclass(frozen=True)
class Place:
    """An item of a step. root: the folder of all steps. name: of the step's folder, as it is when committed.

    item: the name of the item's folder in it; "" if the step's folder is the item's own.
    """

    root: Any
    name: str
    item: str

    @classmethod
    def of(cls, folder: Any) -> Place:
        """The place of a folder that a handler is given, temporary or committed."""
        path = path_of(folder)
        above = path.parent
        is_usual = _USUAL_STEP.fullmatch(_committed(path.name)) is not None
        is_in_step = not is_usual and _STEP.fullmatch(_committed(above.name)) is not None
        if utils.TMP_DIR_SUFFIX in above.name or (is_in_step and utils.TMP_DIR_SUFFIX not in path.name):
            return cls(above.parent, _committed(above.name), _committed(path.name))
        return cls(above, _committed(path.name), "")

    @property
    def step(self) -> int | None:
        """The number of the step; None if the folder's name has none: then it is no step of a run."""
        found = _STEP.fullmatch(self.name)
        return None if found is None else int(found[2])

    @property
    def folder(self) -> Any:
        """The item's folder, when committed."""
        step = self.root / self.name
        return step / self.item if self.item else step

    def steps(self) -> dict[int, Place]:
        """The same item of all steps that are committed, by step."""
        mine = _STEP.fullmatch(self.name)
        found: dict[int, Place] = {}
        with suppress(FileNotFoundError):
            for path in self.root.iterdir():
                other = _STEP.fullmatch(path.name)
                if mine is not None and other is not None and other[1] == mine[1]:
                    found[int(other[2])] = Place(self.root, path.name, self.item)
        return found


def _committed(name: str) -> str:
    return name.partition(utils.TMP_DIR_SUFFIX)[0]


def before(place: Place, allowed: frozenset[int] | None = None) -> Place | None:
    """The item's nearest earlier step that is committed. allowed: steps that may be taken; None: all."""
    step = place.step
    others = {} if step is None else place.steps()
    for other in sorted(others, reverse=True):
        if step is not None and other < step and (allowed is None or other in allowed):
            there = others[other]
            if names(there.folder) and utils.is_checkpoint_finalized(there.root / there.name):
                return there
    return None


def names(folder: Any) -> tuple[str, ...]:
    """The `.tri` files of an item's folder: the last is its own, those before it what that was coded against."""
    try:
        found = [path.name for path in path_of(folder).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return tuple(sorted(name for name in found if STEP_NAME.fullmatch(name)))


def _summary(folder: Any, name: str) -> container.Summary:
    with closing(storage.at(os.fspath(folder)).get(name)) as source:
        return container.read_summary(source)


def parents_of(step_folder: Any) -> Iterator[int]:
    """The steps that files in a step's folder need, as they note them. Raises TricompError if one cannot be read."""
    folder = path_of(step_folder)
    with suppress(FileNotFoundError, NotADirectoryError, MissingFile):  # it is being removed
        for item in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            for name in names(item)[-1:]:
                parent = _parent_in(_summary(item, name))
                if parent is not None:
                    yield parent


def _parent_in(summary: container.Summary) -> int | None:
    """The step that a file notes as its parent's."""
    note = notes_of(summary.metadata).get(NOTE)
    parent = note.get("parent") if isinstance(note, dict) else None
    return parent if summary.parent is not None and type(parent) is int else None


def alone(folder: Any) -> File:
    """The file of an item's folder for its facts; if a delta, without its parent. Raises MissingFile, CorruptFile."""
    path = path_of(folder)
    files = names(path)
    if not files:
        raise MissingFile(
            f"{path}: there is no .tri file in it, so it was not saved by tricomp_jax.orbax. "
            "Restore it with the arguments of the handler that saved it."
        )
    return File(storage.at(os.fspath(path)).get(files[-1]))


def opened(folder: Any, threads: int | None = None, backend: str | None = None) -> File:
    """The file of an item's folder with all that it was coded against. Raises MissingFile, MissingParent, CorruptFile.

    threads, backend: see tricomp.open.
    """
    path = path_of(folder)
    with alone(path) as file:
        name = os.path.basename(file.name)
        content_id = file.parent
        note = notes_of(file.metadata).get(NOTE)
    steps = Steps(storage.at(os.fspath(path)), threads, backend)
    step = number_of(name)
    if content_id is None or not isinstance(note, dict) or type(note.get("parent")) is not int:
        return steps.open(step)
    base = _parent(path, note, step, content_id, threads, backend)
    try:
        found = steps.open_alone(step, base)
    except BaseException:
        base.close()
        raise
    found.own(base)
    return found


def _parent(
    folder: Any, note: dict[str, Any], step: int, content_id: str, threads: int | None, backend: str | None
) -> File:
    """The opened file that a delta names by step. Raises MissingParent, naming both steps."""
    item = note.get("item")
    above = folder.parent if item else folder
    place = Place(above.parent, above.name, folder.name if item else "")
    parent = note["parent"]
    others = {other: there for other, there in place.steps().items() if other < step}  # so that it ends
    needs = f"step {step} in {place.root} needs step {parent} (content id {content_id})"
    advice = (
        "Restore another step. For the steps to come, give CheckpointManager tricomp_jax.orbax.KeepParents(policy), "
        "which keeps what kept steps need."
    )
    if parent not in others or not names(others[parent].folder):
        raise MissingParent(f"{needs}, which is not there: it was removed, as max_to_keep does. {advice}")
    try:
        base = opened(others[parent].folder, threads, backend)
    except WrongReference as error:
        raise MissingParent(f"{needs}, and {error}") from None
    except TricompError as error:
        raise type(error)(f"{needs}, which cannot be read: {error}") from None
    if base.content_id != content_id:
        found = base.content_id
        base.close()
        raise MissingParent(f"{needs}, but that holds {found}: it was saved again since. {advice}")
    return base


def number_of(name: str) -> int:
    """The step of a file by its name."""
    return int(name.removeprefix("step-").removesuffix(".tri"))


def name_of(step: int | None) -> str:
    """The name of a step's file; a folder that is no step of a run has step 0."""
    return file_name(step or 0)
