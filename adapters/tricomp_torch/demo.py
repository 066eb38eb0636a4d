"""The demo behind `tricomp demo`, with PyTorch. The story itself is tricomp's; see tricomp.demos."""

from __future__ import annotations

import torch

from tricomp.demos.story import Framework, tell
from tricomp_torch.demo_run import stream_of

PYTORCH = Framework(
    title=f"PyTorch {torch.__version__}",
    versions={"torch": torch.__version__},
    module="tricomp_torch.demo_run",
    stream_of=stream_of,
    rest="step counts, random state, scheduler",
)


def main(
    *,
    steps: int | None = None,
    every: int | None = None,
    directory: str | None = None,
    as_json: bool = False,
    is_quick: bool = False,
) -> int:
    """Run the demo and print what it found. Returns 0 only if the resumed run equals the uninterrupted one bit for bit.

    directory: kept afterwards, must be empty or new; None: a temporary one. Raises InvalidArgument.
    """
    return tell(PYTORCH, steps=steps, every=every, directory=directory, as_json=as_json, is_quick=is_quick)
