"""CheckpointableHandler: the handler for version 1 of Orbax, which in 0.12 is `orbax.checkpoint.experimental.v1`.

    registry = ocp.handlers.local_registry()
    registry.add(CheckpointableHandler, checkpointable_name="state")
    with ocp.Context(checkpointables_options=ocp.options.CheckpointablesOptions(registry=registry)): ...

The hard thing: that version takes the type of a handler and makes one whenever it needs one, so that what is to last
from one step to the next belongs to the type.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, ClassVar

import jax
import numpy as np

try:
    from orbax.checkpoint.experimental.v1 import handlers
except ImportError:
    try:
        from orbax.checkpoint.v1 import handlers  # where its authors say that it will be
    except ImportError:
        raise ImportError(
            "tricomp_jax.orbax.CheckpointableHandler needs version 1 of Orbax, which this orbax-checkpoint does not "
            "have. Install orbax-checkpoint 0.12.8, or use TricompHandler, which needs none."
        ) from None
from orbax.checkpoint import multihost

from tricomp_jax.orbax.options import Options
from tricomp_jax.orbax.writer import Writer


class CheckpointableHandler(handlers.CheckpointableHandler):  # type: ignore[misc]
    """Saves a checkpointable that is a pytree as a `.tri` file; see TricompHandler."""

    _writer: ClassVar[Writer] = Writer(Options())
    _primary_host: ClassVar[int | None] = 0

    @classmethod
    def configured(cls, *, primary_host: int | None = 0, **options: Any) -> type[CheckpointableHandler]:
        """The type of handlers with other options: those of TricompHandler, by name. It is known by the same name."""
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        return type(
            cls.__name__, (cls,), {**names, "_writer": Writer(Options(**options)), "_primary_host": primary_host}
        )

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        """Take the tree's memory; what is returned writes it. Raises what tricomp_jax.save raises."""
        is_writing = multihost.is_primary_host(self._primary_host)
        taken = self._writer.take(directory.path, checkpointable, None, is_copied=is_writing)
        taken = await asyncio.to_thread(self._writer.choose, taken) if is_writing else taken

        async def write() -> None:
            folder = await directory.await_creation()
            if is_writing:
                await asyncio.to_thread(self._writer.write, folder, taken)

        return write()

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """What was saved, in the types of a target; see tricomp_jax.load. Raises what that raises, MissingParent."""
        # Loaded here, since Orbax would tell any error of what is returned as one of its registry.
        loaded = await asyncio.to_thread(self._writer.restore, directory, abstract_checkpointable, True)

        async def done() -> Any:
            return loaded

        return done()

    async def metadata(self, directory: Any) -> dict[str, Any]:
        """A jax.ShapeDtypeStruct of each array, and the plain values, by path."""
        return self._writer.metadata(directory)

    def is_handleable(self, checkpointable: Any) -> bool:
        """Whether it is a pytree with arrays in it, and else plain values."""
        return _is_tree(checkpointable, jax.Array | np.ndarray | np.generic)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Whether it can be a target."""
        return _is_tree(abstract_checkpointable, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_tree(tree: Any, kinds: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    plain = (bool, int, float, complex, str, bytes)
    return any(isinstance(leaf, kinds) for leaf in leaves) and all(isinstance(leaf, (kinds, *plain)) for leaf in leaves)
