"""Planners that keep pickle out: what is no tensor goes to a file as plain values, as in every other `.tri` file.

They are torch's own planners but for that. The hard thing: torch's turn every value into a pickle on the way out, and
unpickle it on the way in, so no call of theirs that does may be reached.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType

from tricomp import tree
from tricomp.errors import InvalidArgument, MissingLeaf, UnsupportedNode
from tricomp_torch.trees import Flat, flatten

_N_SHOWN = 8


def flat_values(values: dict[str, Any]) -> Flat:
    """Values that are no tensors, by name, as the core takes them. Raises UnsupportedNode, naming the value."""
    flat = flatten(values, on_leaf=_refuse_tensor)
    tree.flatten(flat.tree)  # refuses what it cannot hold
    return flat


def _refuse_tensor(path: str, tensor: torch.Tensor) -> None:
    raise UnsupportedNode(
        f"{path!r}: a tensor in a tuple is not saved as a tensor, and could not be sharded anew. "
        "Put it into a dict or a list."
    )


class TricompSavePlanner(DefaultSavePlanner):
    """torch's DefaultSavePlanner for a TricompWriter: values that are no tensors stay values, and must be plain."""

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_save_to_lowest_rank: bool = False,
    ) -> None:
        super().__init__(
            flatten_state_dict, flatten_sharded_tensors, dedup_save_to_lowest_rank=dedup_save_to_lowest_rank
        )

    def create_local_plan(self) -> SavePlan:
        """torch's plan. Raises UnsupportedNode, naming the entry, before anything is written."""
        flat_values({fqn: entry for fqn, entry in self.state_dict.items() if not isinstance(entry, torch.Tensor)})
        return super().create_local_plan()

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """The object itself. Raises InvalidArgument for what is no tensor: other writers want a pickle of that."""
        if write_item.type == WriteItemType.BYTE_IO:
            raise InvalidArgument(
                f"{write_item.index.fqn!r}: a TricompSavePlanner turns no {type(object).__name__} into bytes. "
                "Use it with a TricompWriter."
            )
        return object

    def value(self, index: MetadataIndex) -> Any:
        """The value at an index that is no tensor."""
        return self.lookup_object(index)


class TricompLoadPlanner(DefaultLoadPlanner):
    """torch's DefaultLoadPlanner for a TricompReader. What does not fit is told by all its names, not by the first.

    allow_partial_load: entries of the state that were not saved stay as they are.
    """

    def create_local_plan(self) -> LoadPlan:
        """torch's plan. Raises MissingLeaf, InvalidArgument: before anything is loaded."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        missing = [fqn for fqn in self.state_dict if fqn not in saved]
        if missing and not self.allow_partial_load:
            raise MissingLeaf(
                f"{len(missing)} of {len(self.state_dict)} entries of the state were not saved: {_few(missing)}. Load "
                "what was saved, or pass planner=TricompLoadPlanner(allow_partial_load=True) to leave them as they are."
            )
        found = [
            text for fqn, entry in self.state_dict.items() if fqn in saved and (text := _misfit(fqn, entry, saved[fqn]))
        ]
        if found:
            raise InvalidArgument(f"the state does not fit; nothing was loaded: {_few(found, '; ')}.")
        return create_default_local_load_plan(self.state_dict, self.metadata, not self.allow_partial_load)

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Refuses: torch's readers bring pickles. Raises InvalidArgument."""
        raise InvalidArgument(
            f"{read_item.dest_index.fqn!r}: a TricompLoadPlanner unpickles nothing. Use it with a TricompReader."
        )

    def load_value(self, read_item: ReadItem, value: Any) -> None:
        """Put a value that is no tensor where it stands in the state."""
        fqn = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], value)
        else:
            self.state_dict[fqn] = value


def _misfit(fqn: str, entry: Any, saved: TensorStorageMetadata | BytesStorageMetadata) -> str:
    """Why an entry of the state cannot take what was saved, or ""."""
    is_tensor = isinstance(entry, torch.Tensor)
    if isinstance(saved, BytesStorageMetadata):
        return f"{fqn!r} is a tensor, and no tensor was saved" if is_tensor else ""
    if not is_tensor:
        return f"{fqn!r} is a {type(entry).__name__}, and a tensor was saved"
    if entry.size() != saved.size:
        return f"{fqn!r} has the shape {list(entry.size())}, {list(saved.size)} was saved"
    return ""


def _few(names: Iterable[str], between: str = ", ") -> str:
    every = list(names)
    rest = f" and {len(every) - _N_SHOWN} more" if len(every) > _N_SHOWN else ""
    return between.join(every[:_N_SHOWN]) + rest
