"""Transformers' Trainer with checkpoints in a tricomp store: TricompTrainer, and the mixin for other Trainers.

Imports transformers, so it is imported by name only. The folders checkpoint-* stay, for rotation and the best model,
but hold small files alone. The hard thing: Trainer takes a checkpoint that lacks something for one that never had it,
and goes on with a fresh optimizer. Here a step is read as a whole, strictly, and what is missing is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import torch

try:
    from transformers import Trainer, TrainerCallback
    from transformers import __version__ as _version
except ImportError as error:
    raise ImportError(
        'tricomp_torch.transformers needs transformers and accelerate: pip install "tricomp[transformers]"'
    ) from error

import tricomp
from tricomp.errors import InvalidArgument
from tricomp_torch import loaders, ranks
from tricomp_torch import rng as generators
from tricomp_torch.checkpointer import Checkpointer
from tricomp_torch.trainer_steps import SAVED_BY, Rotation, is_ours, mark, resume_folder, step_of, step_to_resume

_Base: Any = Trainer if TYPE_CHECKING else object
_OVERRIDDEN = (
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_best_model",
)


class TricompTrainerMixin(_Base):  # type: ignore[misc]
    """Lets a Trainer keep its checkpoints in a tricomp store: `class MyTrainer(TricompTrainerMixin, SFTTrainer): ...`.

    store: a folder or URL, a `tricomp.Store` or a `Checkpointer`; output_dir/tricomp if None. When to save is said as
    ever, by TrainingArguments. save_total_limit and the best model are heeded in a store made for a folder or URL; a
    Store has policies of its own. model_files: also write into checkpoint-* what from_pretrained reads.

    A save copies the state and goes on; it is written behind training. It holds model, optimizer, scheduler,
    GradScaler, TrainerState with its callbacks, and of each process the random states and the loss not yet logged
    (with transformers before 5, the first loss logged after a resume is the mean of the steps since then).

    `train(resume_from_checkpoint=True)` goes on from the store's latest step, bit for bit like a run that was never
    interrupted; a step number or a folder checkpoint-<step> names another. What was not saved by this class is left
    to Trainer, if it is complete. Data must come without randomness of its own: what a dataset or a collator draws is
    drawn anew, as with Trainer's own checkpoints.

    One process, DataParallel and DistributedDataParallel; for FSDP, DeepSpeed and tensor parallel models there is
    tricomp_torch.dcp. Raises InvalidArgument for those.
    """

    def __init__(
        self,
        *args: Any,
        store: Checkpointer | tricomp.Store | str | os.PathLike[str] | None = None,
        model_files: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        ranks.require_whole([self.model], _kind_in_parts(self))
        _require_methods(type(self))
        if store is None and self.args.push_to_hub:
            raise InvalidArgument("store: output_dir is pushed to the hub as a whole. Give a store outside of it.")
        self._rotation = Rotation(self.args.save_total_limit)
        if not isinstance(store, Checkpointer):
            if store is None:
                store = os.path.join(self.args.output_dir, "tricomp")
            own_policies = {} if isinstance(store, tricomp.Store) else self._rotation.policies()
            store = Checkpointer(store, **own_policies)
        self.checkpointer: Checkpointer = store
        self._model_files = model_files
        self._progress = _Progress(self)
        self.add_callback(self._progress)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(TricompTrainerMixin):
            raise InvalidArgument(f"class {cls.__name__}: TricompTrainerMixin comes before Trainer, or does nothing.")

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; resume_from_checkpoint: True (the latest step), a step number, or a folder checkpoint-<step>.

        Raises MissingStep if there is no such step; InvalidArgument if it does not fit the run, or the store goes on
        beyond it; CorruptFile and the like, naming the nearest intact step, if it is damaged.
        """
        if (args and args[0] is not None) or kwargs.get("trial") is not None:
            raise InvalidArgument("train: trials of a search would share one store. Search with a plain Trainer.")
        step = step_to_resume(self.checkpointer.store, resume_from_checkpoint)
        self._progress.begin(step, is_foreign=step is None and bool(resume_from_checkpoint))
        with self.checkpointer:
            if self.args.save_strategy != "no" and self.is_world_process_zero():
                self.checkpointer.store.claim()  # else the first save would tell that another run writes there
            if step is None:
                return super().train(resume_from_checkpoint or None, *args, **kwargs)
            with resume_folder(self.checkpointer.store, step, self.args.output_dir) as folder:
                return super().train(folder, *args, **kwargs)

    # Saving: Trainer's own _save_checkpoint makes the folder, writes TrainerState to it and rotates old ones away.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        step, progress = self.state.global_step, self._progress
        if step in progress.saved and _is_inside_a_step(self.model):
            return  # asked for by a signal; what was saved at the step's end is exact
        limit = self.args.save_total_limit
        progress.is_saving = True
        try:
            if progress.is_foreign:  # the one checkpoint there is, until the store has another
                self.args.save_total_limit = None
            super()._save_checkpoint(*args, **kwargs)
        finally:
            progress.is_saving = False
            self.args.save_total_limit = limit
        self._rotation.best(step_of(self.state.best_model_checkpoint))
        states = ranks.gathered(
            {
                "rng": generators.get_state(),
                "epoch": progress.epoch,
                "loss": self._tr_loss.detach().cpu() if hasattr(self, "_tr_loss") else None,
                "logged_at": self._globalstep_last_logged,
            }
        )
        if self.is_world_process_zero():
            state = json.dumps(dataclasses.asdict(self.state), sort_keys=True).encode()
            extra = {
                "trainer_state": torch.frombuffer(bytearray(state), dtype=torch.uint8),
                "processes": states,
                **self._scaler(),
            }
            self.checkpointer.save(
                step,
                model=self.model,
                **({} if self.args.save_only_model else self._optimizer_and_scheduler()),
                extra=extra,
                rng=False,
                metadata={"saved_by": SAVED_BY, "epoch": self.state.epoch, "transformers": _version},
                force=True,
                overwrite=step in progress.saved,
            )
        progress.saved.add(step)
        if progress.is_foreign:
            self.checkpointer.wait()
            progress.is_foreign = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. Within a checkpoint it writes a note of where the weights are, unless model_files."""
        if not self._progress.is_saving or self._model_files:
            super().save_model(output_dir, _internal_call)
        if self._progress.is_saving and self.args.should_save:
            mark(str(output_dir), self.checkpointer.store, self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """They are in the store."""

    def _save_scaler(self, output_dir: str) -> None:
        """It is in the store."""

    def _save_rng_state(self, output_dir: str) -> None:
        """It is in the store."""

    # Resuming. All of it is loaded when model and optimizer have been made ready; random states when data has been
    # skipped.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._progress.resumed is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        step = self._progress.resumed
        if step is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        try:
            restored = self.checkpointer.restore(
                model=self.model, **self._optimizer_and_scheduler(), extra=self._scaler(), step=step, rng=False
            )
        except InvalidArgument as error:
            error.add_note(
                "Trainer goes on from whole states only. For the weights alone: Checkpointer(store).restore("
                "model=model, step=..., strict=False, rng=False), then train() into another store."
            )
            raise
        assert restored is not None
        states = restored.extra["processes"]
        what = f"step {step} of {self.checkpointer.store.url}"
        self._progress.own = ranks.own(states, self.args.process_index, self.args.world_size, what)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._progress.resumed is None:
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._progress.resumed is None or checkpoint is None:
            super()._load_rng_state(checkpoint)
            return
        own = self._progress.own
        if own is None:
            raise InvalidArgument(
                f"transformers {_version} did not ask for the optimizer's state when it resumed; nothing was trained. "
                "Use another version."
            )
        if own:
            generators.set_state(own["rng"])
            if not self._progress.skips_data():
                self._progress.epoch = loaders.get_state(self.callback_handler.train_dataloader)

    def _load_best_model(self) -> None:
        self.checkpointer.wait()
        self.accelerator.wait_for_everyone()
        folder = self.state.best_model_checkpoint
        step = step_of(folder)
        if step is None or not (is_ours(folder) or step in self.checkpointer.store.steps()):
            super()._load_best_model()
            return
        self.checkpointer.restore(model=self.model, step=step, rng=False)

    def _optimizer_and_scheduler(self) -> dict[str, Any]:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # what accelerate wraps
        return {"optimizer": optimizer, "scheduler": self.lr_scheduler}

    def _scaler(self) -> dict[str, Any]:
        scaler = getattr(self.accelerator, "scaler", None)
        return {} if scaler is None else {"scaler": scaler}


class TricompTrainer(TricompTrainerMixin, Trainer):
    """transformers.Trainer with its checkpoints in a tricomp store. See TricompTrainerMixin.

    >>> trainer = TricompTrainer(model=model, args=args, train_dataset=data, store="runs/a")  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint=trainer.checkpointer.store.latest() is not None)  # doctest: +SKIP
    """


class _Progress(TrainerCallback):
    """Where a call of train is; notes where each epoch begins, and puts back what Trainer itself forgets."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.is_saving = False
        self.epoch: dict[str, Any] | None = None  # what the order of this epoch's data comes from
        self.begin(None, is_foreign=False)

    def begin(self, resumed: int | None, is_foreign: bool) -> None:
        """Train from that step of the store; is_foreign: from a checkpoint that is none of the store's."""
        self.resumed, self.is_foreign = resumed, is_foreign
        self.own: dict[str, Any] | None = None  # this process's part of what was restored
        self.saved: set[int] = set()  # auto_find_batch_size begins anew within one call
        self._is_first = False

    def skips_data(self) -> bool:
        """Whether the run goes on in the middle of an epoch, with the data that comes then."""
        epoch = self._trainer.state.epoch
        return bool(epoch != int(epoch)) and not self._trainer.args.ignore_data_skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, own = self._trainer, self.own
        self._is_first = bool(own)
        if own and own["loss"] is not None and hasattr(trainer, "_tr_loss"):
            trainer._tr_loss = own["loss"].to(args.device)
            trainer._total_loss_scalar = -trainer._tr_loss.item()  # the mean over this call's own steps leaves it out
            trainer._globalstep_last_logged = own["logged_at"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        if self._is_first and self.own and self.skips_data():
            self.epoch = self.own["epoch"]
            loaders.set_state(train_dataloader, self.own["epoch"])
        else:
            self.epoch = loaders.get_state(train_dataloader)
        self._is_first = False


def _kind_in_parts(trainer: Any) -> str:
    kinds = {"FSDP": ("is_fsdp_enabled", "is_fsdp_xla_enabled"), "DeepSpeed": ("is_deepspeed_enabled",)}
    return next((kind for kind, flags in kinds.items() if any(getattr(trainer, flag, False) for flag in flags)), "")


def _require_methods(kind: type) -> None:
    """Raise InvalidArgument if Trainer no longer has what is overridden here, and so would go on without it."""
    bases = kind.__mro__[kind.__mro__.index(TricompTrainerMixin) + 1 :]
    missing = [name for name in _OVERRIDDEN if not any(name in vars(base) for base in bases)]
    if missing:
        raise InvalidArgument(f"transformers {_version}: {kind.__name__} needs a Trainer with {', '.join(missing)}.")


def _is_inside_a_step(model: Any) -> bool:
    return any(parameter.grad is not None for parameter in model.parameters())
