"""Distributed checkpoints: torch.distributed.checkpoint's own engine, with `.tri` files, deltas and no pickle.

A checkpoint is a folder: one `.tri` file a rank, and an index that is written last. It loads onto any number of ranks.

>>> from tricomp_torch import dcp  # doctest: +SKIP
>>> writer = dcp.TricompWriter()  # doctest: +SKIP
>>> dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="runs/a/100", storage_writer=writer)  # doctest: +SKIP
>>> dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="runs/a/100")  # doctest: +SKIP

Imported by name only: `import tricomp_torch` does without torch.distributed.
"""  # noqa: E501

from tricomp_torch.dcp.chains import chain
from tricomp_torch.dcp.planners import TricompLoadPlanner, TricompSavePlanner
from tricomp_torch.dcp.reader import TricompReader
from tricomp_torch.dcp.rebasing import rebase
from tricomp_torch.dcp.verbs import async_save, load, save
from tricomp_torch.dcp.writer import TricompWriter

__all__ = [
    "TricompLoadPlanner",
    "TricompReader",
    "TricompSavePlanner",
    "TricompWriter",
    "async_save",
    "chain",
    "load",
    "rebase",
    "save",
]
