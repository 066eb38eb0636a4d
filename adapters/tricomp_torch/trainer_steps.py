"""Which step a Trainer resumes from, its folders checkpoint-*, and which steps its store keeps. Knows no transformers.

The hard thing: Trainer resumes from folders, and the truth is the store, which may have steps whose folder is gone, and
none for folders whose save was cut short. So it is handed a folder that is made for the purpose.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tricomp
from tricomp.errors import InvalidArgument, MissingStep

SAVED_BY = "TricompTrainer"
STATE_LEAF = "extra/trainer_state"
_NOTE = "tricomp.json"
_STATE = "trainer_state.json"
_STOCK = ("optimizer.pt", "scheduler.pt", _STATE)


def step_to_resume(store: tricomp.Store, asked: Any) -> int | None:
    """The step of the store that train(resume_from_checkpoint=asked) means; None: none, it is Trainer's affair.

    Raises MissingStep; InvalidArgument if the store goes on beyond where the run will be, or a folder is incomplete.
    """
    latest = store.latest()
    step, place = _asked(store, asked, latest)
    if latest is not None and place < latest:
        advice = (
            "Pass resume_from_checkpoint=True to go on from there, or give another store."
            if step is None
            else f"Take them away with tricomp.Store({store.url!r}).rewind({place}), or give another store."
        )
        raise InvalidArgument(f"train: {store.url} has checkpoints up to step {latest}, beyond step {place}. {advice}")
    if step is not None:
        with store.open(step) as file:
            if file.metadata.get("saved_by") != SAVED_BY:
                raise InvalidArgument(
                    f"step {step} of {store.url} was not saved by a {SAVED_BY}: it has no TrainerState."
                )
    return step


def _asked(store: tricomp.Store, asked: Any, latest: int | None) -> tuple[int | None, int]:
    """The store's step, if it is one, and the step at which the run begins."""
    if asked is None or asked is False:
        return None, -1
    if asked is True:
        if latest is None:
            raise MissingStep(
                f"resume_from_checkpoint=True, but there are no checkpoints in {store.url}. "
                "Train without it first, or check the path."
            )
        return latest, latest
    if isinstance(asked, int):
        return asked, asked
    folder = os.fspath(asked)
    step = step_of(folder)
    if step is None:
        raise InvalidArgument(f"resume_from_checkpoint: expected a folder named checkpoint-<step>, got {folder!r}.")
    if is_ours(folder) or step in store.steps():
        return step, step
    if not os.path.isdir(folder):
        raise MissingStep(f"resume_from_checkpoint: there is no folder {folder}, and no step {step} in {store.url}.")
    missing = [name for name in _STOCK if not os.path.isfile(os.path.join(folder, name))]
    missing += [] if any(name.startswith("rng_state") for name in os.listdir(folder)) else ["rng_state.pth"]
    if missing:
        raise InvalidArgument(
            f"{folder}: {', '.join(missing)} not found; Trainer would go on from there with a fresh state instead. "
            "To train anew from its weights, load them with from_pretrained and leave out resume_from_checkpoint."
        )
    return None, step


def step_of(folder: str | None) -> int | None:
    """The step in a folder's name, or None."""
    found = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.normpath(folder))) if folder else None
    return int(found[1]) if found else None


def is_ours(folder: str) -> bool:
    """Whether the folder notes a step of a store."""
    return os.path.isfile(os.path.join(folder, _NOTE))


def mark(folder: str, store: tricomp.Store, step: int) -> None:
    """Make the folder one that notes a step of a store, which a plain Trainer refuses to resume from."""
    os.makedirs(folder, exist_ok=True)
    note = json.dumps({"store": store.url, "step": step, "resume_with": SAVED_BY}, indent=2) + "\n"
    for name in (_NOTE, "optimizer.pt", "scheduler.pt"):  # a Trainer that finds no optimizer.pt takes a fresh optimizer
        Path(folder, name).write_text(note)


@contextmanager
def resume_folder(store: tricomp.Store, step: int, output_dir: str) -> Iterator[str]:
    """A folder, for as long as training runs, with the TrainerState of a step, whose best model is in output_dir."""
    with store.open(step) as file:
        state = json.loads(file[STATE_LEAF].tobytes())
    best = step_of(state.get("best_model_checkpoint"))
    if best is not None and best in store.steps():
        state["best_model_checkpoint"] = os.path.join(output_dir, f"checkpoint-{best}")
        mark(state["best_model_checkpoint"], store, best)
    with tempfile.TemporaryDirectory(prefix="tricomp-") as folder:
        path = Path(folder, f"checkpoint-{step}")
        path.mkdir()
        (path / _STATE).write_text(json.dumps(state))
        yield str(path)


class Rotation:
    """The retention policy of a Trainer: its save_total_limit latest steps, the best one among them if there is one.

    limit: None or 0 keeps all. One policy instance serves one Trainer.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._best: tuple[int | None, ...] = (None,)

    def best(self, step: int | None) -> None:
        """Note the best step. The one before stays wanted until the next call: a step on its way may replace it."""
        self._best = (self._best[-1], step)

    def kept(self, steps: Sequence[int]) -> list[int]:
        """As tricomp.KeepLast, with the best."""
        wanted = [step for step in steps if step in self._best]
        for step in reversed(steps):
            if step not in wanted and (len(wanted) < (self._limit or len(steps)) or step == steps[-1]):
                wanted.append(step)
        return wanted

    def policies(self) -> dict[str, Any]:
        """Options of a Store. Of a chain all is kept that a step needs, so chains are no longer than the limit."""
        if not self._limit:
            return {}
        return {"keep": [self], "keyframe": tricomp.KeyframeEvery(min(self._limit, 10))}
