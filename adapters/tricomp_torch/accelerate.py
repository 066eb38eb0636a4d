"""Accelerate: everything that an Accelerator has prepared, in a tricomp store; and loaders that go on within a pass.

Imports accelerate, so it is imported by name only. The hard thing: accelerate's hooks are for models alone, and it
saves optimizers beside them by pickle whatever a hook does. So save_state and load_state stand in place of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

try:
    import accelerate
except ImportError as error:
    raise ImportError('tricomp_torch.accelerate needs accelerate: pip install "tricomp[accelerate]"') from error

import tricomp
from tricomp.background import Saving
from tricomp.errors import InvalidArgument
from tricomp_torch import loaders, ranks
from tricomp_torch import rng as generators
from tricomp_torch.checkpointer import Checkpointer, Restored
from tricomp_torch.objects import unwrapped

_SAVED_BY = "tricomp_torch.accelerate"
_IN_PARTS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP", "XLA")


def save_state(
    accelerator: accelerate.Accelerator,
    checkpointer: Checkpointer,
    step: int,
    *,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> Saving[tricomp.Report] | None:
    """Save what accelerator.save_state would, at step: models, optimizers, schedulers, GradScaler, registered objects.

    Also, of every process, its random states and what its loaders shuffle by. All processes call it; the first one
    writes, behind training: the Future and other arguments are those of Checkpointer.save; elsewhere, and if step is
    not due, it returns None. Hooks registered with the accelerator are not called.

    Raises InvalidArgument amid accumulated gradients, which no checkpoint holds, and for models in parts (FSDP,
    DeepSpeed, tensor parallel: see tricomp_torch.dcp); what Checkpointer.save raises.
    """
    objects = _objects(accelerator)
    if not checkpointer.is_due(step, force):
        return None
    if not accelerator.sync_gradients:
        raise InvalidArgument(
            f"save_state: step {step} is amid gradients that are being accumulated, and they are not saved. "
            "Save where accelerator.sync_gradients is true."
        )
    mine = {
        "rng": generators.get_state(),
        "loaders": [loaders.get_state(loader) for loader in accelerator._dataloaders],
        "resumable": [loader.state_dict() for loader in _resumable(accelerator)],
    }
    processes = ranks.gathered(mine)
    if not accelerator.is_main_process:
        return None
    return checkpointer.save(
        step,
        **_slots(objects),
        extra={**_extra(accelerator, objects), "processes": processes, "step": accelerator.step},
        rng=False,
        metadata={**(metadata or {}), "saved_by": _SAVED_BY, "objects": _names(objects)},
        force=force,
        overwrite=overwrite,
    )


def load_state(
    accelerator: accelerate.Accelerator,
    checkpointer: Checkpointer,
    step: int | None = None,
    *,
    models_only: bool = False,
) -> Restored | None:
    """Load step, the latest if None, into all that the accelerator has prepared. None if there are no steps.

    All processes call it, when everything is prepared and registered as it was at the save. models_only: the weights
    alone; optimizers and all else stay fresh, which is an error otherwise.

    Raises InvalidArgument listing what does not fit, before anything is changed; MissingStep; CorruptFile and the like,
    naming the nearest intact step.
    """
    objects = _objects(accelerator)
    checkpointer.wait()
    step = checkpointer.store.latest() if step is None else step
    if step is None:
        return None
    what = f"step {step} of {checkpointer.store.url}"
    if models_only:
        return checkpointer.restore(model=_slots(objects).get("model"), step=step, rng=False)
    with checkpointer.store.open(step) as file:
        _require_same(file.metadata, _names(objects), what)
    restored = checkpointer.restore(**_slots(objects), extra=_extra(accelerator, objects), step=step, rng=False)
    assert restored is not None
    mine = ranks.own(restored.extra["processes"], accelerator.process_index, accelerator.num_processes, what)
    accelerator.step = restored.extra["step"]
    for loader, state in zip(accelerator._dataloaders, mine.get("loaders", ()), strict=False):
        loaders.set_state(loader, state, rng=False)
    for resumable, state in zip(_resumable(accelerator), mine.get("resumable", ()), strict=False):
        resumable.load_state_dict(state)
    if mine:
        generators.set_state(mine["rng"])
    return restored


class ResumableLoader:
    """A prepared DataLoader that after load_state goes on within its pass: the batches that come are those not seen.

    The order is that of the run that was saved, whatever the sampler: the pass is begun again from the random states
    it began with, and the batches seen are skipped. epoch: passes that ended. n_batches: given in this pass. It
    registers itself for checkpointing. What a dataset or a collator draws in this process is drawn anew.

    >>> loader = ResumableLoader(accelerator, accelerator.prepare(loader))  # doctest: +SKIP
    >>> load_state(accelerator, checkpointer)  # doctest: +SKIP
    >>> for epoch in range(loader.epoch, n_epochs):  # doctest: +SKIP
    ...     for batch in loader:
    ...         train_one(batch)
    """

    def __init__(self, accelerator: accelerate.Accelerator, loader: Any) -> None:
        self.loader = loader
        self.epoch = 0
        self.n_batches = 0
        self._accelerator = accelerator
        self._begun_with: dict[str, Any] | None = None
        self._is_resumed = False
        accelerator.register_for_checkpointing(self)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self._is_resumed:
            batches = self._rest_of_pass()
        else:
            self._begun_with, self.n_batches = loaders.get_state(self.loader), 0
            batches = iter(self.loader)
        for batch in batches:
            self.n_batches += 1
            yield batch
        assert self._begun_with is not None
        if self._begun_with["iteration"] is not None:  # a loader made for skipping has counted, not this one
            self.loader.iteration = self._begun_with["iteration"] + 1
        self._begun_with, self.n_batches = None, 0
        self.epoch += 1

    def _rest_of_pass(self) -> Iterator[Any]:
        assert self._begun_with is not None
        self._is_resumed = False
        now = generators.get_state()
        loaders.set_state(self.loader, self._begun_with)
        is_over = self.n_batches >= _n_batches(self.loader)  # then one is left, for loaders that cannot give none
        rest = self._accelerator.skip_first_batches(self.loader, self.n_batches - is_over)
        if hasattr(rest, "iteration"):  # older versions forget it, and shuffle as for the first pass
            rest.iteration = self.loader.iteration
        batches = iter(rest)
        first = list(islice(batches, 1))  # samplers draw when they are first asked
        generators.set_state(now)
        return chain([] if is_over else first, batches)

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as plain data and tensors."""
        begun_with = loaders.get_state(self.loader) if self._begun_with is None else self._begun_with
        return {"epoch": self.epoch, "n_batches": self.n_batches, "begun_with": begun_with}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next iteration."""
        self.epoch, self.n_batches = state["epoch"], state["n_batches"]
        self._is_resumed = self.n_batches > 0
        self._begun_with = dict(state["begun_with"]) if self._is_resumed else None
        if not self._is_resumed:
            loaders.set_state(self.loader, state["begun_with"], rng=False)


def _n_batches(loader: Any) -> float:
    try:
        return len(loader)
    except TypeError:  # of a stream
        return float("inf")


def _objects(accelerator: accelerate.Accelerator) -> dict[str, list[Any]]:
    """What the accelerator has prepared, out of its wrappers. Raises InvalidArgument if it cannot be stored whole."""
    kind = str(accelerator.distributed_type.value)
    ranks.require_whole(accelerator._models, kind if kind in _IN_PARTS else "")
    if any(getattr(loader, "use_stateful_dataloader", False) for loader in accelerator._dataloaders):
        raise InvalidArgument("use_stateful_dataloader: not supported. Leave it out, and use a ResumableLoader.")
    return {
        "model": [unwrapped(model) for model in accelerator._models],
        "optimizer": [getattr(optimizer, "optimizer", optimizer) for optimizer in accelerator._optimizers],
        "scheduler": [getattr(scheduler, "scheduler", scheduler) for scheduler in accelerator._schedulers],
        "registered": [thing for thing in accelerator._custom_objects if not isinstance(thing, ResumableLoader)],
    }


def _slots(objects: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Arguments of Checkpointer.save and restore: what there is one of stands alone."""
    slots = {slot: objects[slot] for slot in ("model", "optimizer", "scheduler") if objects[slot]}
    return {slot: entries[0] if len(entries) == 1 else entries for slot, entries in slots.items()}


def _extra(accelerator: accelerate.Accelerator, objects: Mapping[str, list[Any]]) -> dict[str, Any]:
    extra: dict[str, Any] = {"registered": objects["registered"]}
    return extra if accelerator.scaler is None else {**extra, "scaler": accelerator.scaler}


def _resumable(accelerator: accelerate.Accelerator) -> list[ResumableLoader]:
    return [thing for thing in accelerator._custom_objects if isinstance(thing, ResumableLoader)]


def _names(objects: Mapping[str, list[Any]]) -> dict[str, list[str]]:
    return {slot: [type(entry).__name__ for entry in entries] for slot, entries in objects.items()}


def _require_same(metadata: Mapping[str, Any], here: Mapping[str, list[str]], what: str) -> None:
    """Raise InvalidArgument if another number of objects was saved."""
    if metadata.get("saved_by") != _SAVED_BY:
        raise InvalidArgument(f"{what} was not saved by save_state. Load it with Checkpointer.restore.")
    saved = metadata.get("objects", {})
    found = [
        f"{slot}: saved {', '.join(saved.get(slot, [])) or 'none'}; the accelerator has {', '.join(names) or 'none'}"
        for slot, names in here.items()
        if len(saved.get(slot, [])) != len(names)
    ]
    if found:
        lines = "\n  ".join(found)
        raise InvalidArgument(
            f"{what} does not fit; nothing was changed.\n  {lines}\n"
            "Prepare and register what was saved, or pass models_only=True for the weights alone."
        )
