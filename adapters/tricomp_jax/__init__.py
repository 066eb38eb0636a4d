"""JAX adapter of tricomp: pytrees in `.tri` files, and a hook for training loops. Never pickles.

>>> tricomp_jax.save("step7.tri", state)  # doctest: +SKIP
>>> state = tricomp_jax.load("step7.tri", target=state)  # doctest: +SKIP
"""

if __name__ != "tricomp_jax":
    raise ImportError(f"import tricomp_jax by that name, not as {__name__!r}; 'adapters' is a folder, not a package")

try:
    import jax
except ModuleNotFoundError as error:
    if error.name not in ("jax", "jaxlib"):
        raise
    raise ModuleNotFoundError(
        "tricomp_jax needs jax, which is not installed. Install it: pip install 'tricomp[jax]', or jax[cuda13] and the "
        "like for an accelerator. tricomp.load reads the same files as numpy arrays, without jax.",
        name=error.name,
    ) from None

from tricomp_jax.checkpoints import Restored
from tricomp_jax.files import load, save
from tricomp_jax.hook import CheckpointHook
from tricomp_jax.processes import load_step
from tricomp_jax.safe import load_file, safe_open, save_file
from tricomp_jax.transform import save_every
from tricomp_jax.trees import Flat, flatten, unflatten

del jax

__all__ = [
    "CheckpointHook",
    "Flat",
    "Restored",
    "flatten",
    "load",
    "load_file",
    "load_step",
    "safe_open",
    "save",
    "save_every",
    "save_file",
    "unflatten",
]
