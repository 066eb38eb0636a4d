"""Runs of a small GPT-2 by transformers' Trainer, for its tests: dropout, tied weights, shuffled data, accumulation.

Each scene is what one rank does, see tests/dcp_ranks.py.
"""

from __future__ import annotations

import gc
import os
from functools import lru_cache
from typing import Any

import torch
import transformers
from tricomp_torch.transformers import TricompTrainer

import tricomp.store
from tests.groups import die_in_file

N_SAMPLES = 61  # 16 batches of 4, the last one short; 8 steps an epoch


@lru_cache
def data(n_samples=N_SAMPLES):
    """Bytes of a Python source, of several lengths."""
    assert tricomp.store.__file__ is not None
    with open(tricomp.store.__file__, "rb") as file:
        text = file.read()
    starts = range(0, 29 * n_samples, 29)
    return [{"input_ids": torch.tensor(list(text[i : i + 9 + i % 7]))} for i in starts]


def collate(samples):
    """A batch cut to its shortest."""
    length = min(len(sample["input_ids"]) for sample in samples)
    tokens = torch.stack([sample["input_ids"][:length] for sample in samples])
    return {"input_ids": tokens, "labels": tokens}


def model(**config):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 256, "n_positions": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **tokens, **config}))


class Stop(transformers.TrainerCallback):
    """Ends a run as a Ctrl-C would, when a step begins."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def trainer(folder, stop=None, kind: Any = TricompTrainer, callbacks=(), of=model, options=None, **arguments):
    """stop: the step at which the run is cut. options: of the mixin. arguments: of TrainingArguments."""
    transformers.set_seed(5)
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 3e-3,
            "warmup_steps": 3,
            "logging_steps": 4,
            "save_steps": 3,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "seed": 7,
            **arguments,
        }
    )
    made = kind(
        model=of(),
        args=args,
        train_dataset=data(),
        eval_dataset=data(9),
        data_collator=collate,
        callbacks=[*callbacks, *([Stop(stop)] if stop is not None else [])],
        **(options or {}),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def run(folder, stop=None, resume=None, **options):
    """A trainer that has trained; if stop, until it was cut."""
    made = trainer(folder, stop, **options)
    try:
        made.train(resume_from_checkpoint=resume)
        assert stop is None
    except KeyboardInterrupt:
        pass
    return made


def outcome(made):
    """All that two runs must have in common: tensors as bytes, and what was logged but for the time it took."""
    tensors = {name: tensor.numpy().tobytes() for name, tensor in made.model.state_dict().items()}
    optimizer = made.optimizer.state_dict()
    moments = [
        {key: value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
        for entry in optimizer["state"].values()
    ]
    groups = optimizer["param_groups"]
    ours = ("loss", "grad_norm", "learning_rate", "epoch", "step", "eval_loss")
    logged = [{key: entry[key] for key in ours if key in entry} for entry in made.state.log_history]
    state = (made.state.global_step, made.state.epoch, made.state.best_metric, made.state.total_flos)
    return tensors, moments, groups, made.lr_scheduler.state_dict(), logged, state, torch.get_rng_state().tolist()


def killed(rank, n, folder, at):
    """Dies by SIGKILL in the middle of writing a checkpoint, number at."""
    die_in_file(at)
    gc.freeze()
    trainer(folder).train()


def ranks(rank, n, folder):
    """Two processes in DistributedDataParallel: cut and resumed, as if never cut."""
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}
    os.environ.update({name: str(value) for name, value in environ.items()})
    gc.freeze()  # accelerate collects often
    arguments = {"train_sampling_strategy": "group_by_length", "ddp_backend": "gloo"}
    whole = run(f"{folder}/whole", **arguments)
    run(f"{folder}/cut", stop=5, **arguments)
    torch.distributed.barrier()
    again = run(f"{folder}/cut", resume=True, **arguments)
    assert outcome(again) == outcome(whole)
    assert whole.state.global_step == 8


SCENES = {"killed": killed, "ranks": ranks}
