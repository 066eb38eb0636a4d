"""Options: how the handlers of Orbax's versions 0 and 1 save. Imports no file code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tricomp import codec
from tricomp.chain import KeyframeEvery
from tricomp.errors import InvalidArgument
from tricomp.plan import Spec, check_spec
from tricomp_jax.orbax.policy import KeepParents


@dataclass(frozen=True)
class Options:
    """How a handler saves.

    keyframe: how often a step stands alone, at least. spec: see tricomp.Spec.
    parents: "linked": a step's folder also has hard links of the files that its own was coded against, so that any step
    can be removed, and a folder be copied away. Then a step stands alone as well if the one before needs one that was
    removed, so that no more files take room than twice those of the steps that are there; and always where the file
    system has no hard links. A KeepParents, which the manager is given too: steps name each other, and it keeps those
    that are needed; the first of a run stands alone.
    reference_in: where the words of a step wait for the next to be coded against: in memory ("host"), or in its file
    ("store"), from where they are decoded again.
    threads, backend: see tricomp.open. Raises InvalidArgument.
    """

    keyframe: KeyframeEvery = KeyframeEvery(10)  # noqa: RUF009 - it is frozen
    spec: Spec | None = None
    parents: Literal["linked"] | KeepParents = "linked"
    reference_in: Literal["host", "store"] = "host"
    threads: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.keyframe, KeyframeEvery):
            raise InvalidArgument(f"keyframe: expected a tricomp.KeyframeEvery, got {self.keyframe!r:.80}.")
        if self.parents != "linked" and not isinstance(self.parents, KeepParents):
            raise InvalidArgument(f"parents: expected 'linked' or a KeepParents, got {self.parents!r:.80}.")
        if self.reference_in not in ("host", "store"):
            raise InvalidArgument(f"reference_in: expected 'host' or 'store', got {self.reference_in!r:.80}.")
        check_spec(self.spec)
        codec.Engine(self.threads, self.backend)
