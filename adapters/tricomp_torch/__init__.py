"""PyTorch adapter of tricomp: torch trees in `.tri` files, and a Checkpointer for training runs. Never pickles.

>>> tricomp_torch.save(model.state_dict(), "model.tri")  # doctest: +SKIP
>>> model.load_state_dict(tricomp_torch.load("model.tri"))  # doctest: +SKIP
"""

if __name__ != "tricomp_torch":
    raise ImportError(f"import tricomp_torch by that name, not as {__name__!r}; 'adapters' is a folder, not a package")

from tricomp_torch.checkpointer import Checkpointer, Restored
from tricomp_torch.compressed import CompressedStateDict
from tricomp_torch.files import load, save
from tricomp_torch.safe import load_file, safe_open, save_file
from tricomp_torch.snapshot import Snapshot, snapshot
from tricomp_torch.subclasses import register_tensor
from tricomp_torch.trees import Flat, flatten, unflatten

__all__ = [
    "Checkpointer",
    "CompressedStateDict",
    "Flat",
    "Restored",
    "Snapshot",
    "flatten",
    "load",
    "load_file",
    "register_tensor",
    "safe_open",
    "save",
    "save_file",
    "snapshot",
    "unflatten",
]
