"""TricompHandler and its arguments, for Orbax's CheckpointManager and Checkpointer. Writer does the work.

    manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=3))
    manager.save(step, args=TricompSave(state))
    state = manager.restore(manager.latest_step(), args=TricompRestore(target))

The hard thing: what reads device memory is done when async_save returns its futures, since the training step that
follows may donate that memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orbax.checkpoint import args, future, handlers, multihost

from tricomp.chain import KeyframeEvery
from tricomp.errors import InvalidArgument
from tricomp.plan import Spec
from tricomp_jax.orbax.options import Options
from tricomp_jax.orbax.policy import KeepParents
from tricomp_jax.orbax.writer import Taken, Writer


class TricompHandler(handlers.AsyncCheckpointHandler):  # type: ignore[misc]
    """Saves pytrees as `.tri` files: each against the step before, once in a while one that stands alone.

    CheckpointManager makes one by itself when it is given TricompSave; for other options give it one, as item_handlers
    or in a handler registry. An item's folder holds `step-000000000012.tri`, which tricomp.load and the command line
    read as any other.
    """

    def __init__(
        self,
        keyframe: KeyframeEvery = KeyframeEvery(10),  # noqa: B008 - it is frozen
        spec: Spec | None = None,
        parents: Literal["linked"] | KeepParents = "linked",
        reference_in: Literal["host", "store"] = "host",
        *,
        threads: int | None = None,
        backend: str | None = None,
        primary_host: int | None = 0,
    ) -> None:
        """See Options. primary_host: the process that writes, as in Orbax's MultiprocessingOptions; None: each does."""
        self._writer = Writer(Options(keyframe, spec, parents, reference_in, threads, backend))
        self._primary_host = primary_host

    async def async_save(self, directory: Any, args: TricompSave) -> list[future.Future]:
        """Take the tree's memory; write in the futures that are returned. Raises what tricomp_jax.save raises."""
        is_writing = multihost.is_primary_host(self._primary_host)
        taken = self._taken(directory, args, is_copied=is_writing)
        if not is_writing:
            return []
        taken = await asyncio.to_thread(self._writer.choose, taken)

        async def write() -> None:
            await asyncio.to_thread(self._writer.write, directory, taken)

        return [future.CommitFutureAwaitingContractedSignals(write(), name="tricomp_save")]

    def save(self, directory: Any, args: TricompSave) -> None:
        """Save, and return when the file is durable."""
        is_writing = multihost.is_primary_host(self._primary_host)
        taken = self._taken(directory, args, is_copied=is_writing and self._writer.is_holding)
        if is_writing:
            self._writer.write(directory, self._writer.choose(taken))

    def _taken(self, directory: Any, args: TricompSave, is_copied: bool) -> Taken:
        if not isinstance(args, TricompSave):
            raise InvalidArgument(f"TricompHandler: expected args=TricompSave(tree), got a {type(args).__name__}.")
        return self._writer.take(directory, args.tree, args.metadata, is_copied)

    def restore(self, directory: Any, args: TricompRestore | None = None) -> Any:
        """What was saved. Raises what tricomp_jax.load raises, MissingParent."""
        args = TricompRestore() if args is None else args
        if not isinstance(args, TricompRestore):
            raise InvalidArgument(f"TricompHandler: expected args=TricompRestore(target), got a {type(args).__name__}.")
        return self._writer.restore(directory, args.target, args.strict)

    def metadata(self, directory: Any) -> dict[str, Any]:
        """A jax.ShapeDtypeStruct of each array, and the plain values, by path."""
        return self._writer.metadata(directory)

    def close(self) -> None:
        """Free the words that wait for the next step."""
        self._writer.close()

    @classmethod
    def typestr(cls) -> str:
        """What Orbax writes into a step's folder, to know the handler again: never another."""
        return "tricomp_jax.orbax.TricompHandler"


@args.register_with_handler(TricompHandler, for_save=True)
@dataclass
class TricompSave(args.CheckpointArgs):  # type: ignore[misc]
    """tree: any pytree that tricomp_jax.save takes. metadata: plain values to go with it, which tricomp.open shows."""

    tree: Any
    metadata: Mapping[str, Any] | None = field(default=None)


@args.register_with_handler(TricompHandler, for_restore=True)
@dataclass
class TricompRestore(args.CheckpointArgs):  # type: ignore[misc]
    """target, strict: see tricomp_jax.load. None: dicts, lists and tuples of arrays on the default device."""

    target: Any = None
    strict: bool = True
