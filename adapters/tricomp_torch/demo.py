"""The demo behind `tricomp demo`, with PyTorch. The story itself is tricomp's; see tricomp.demos."""

from __future__ import annotations

from functools import partial

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

main = partial(tell, PYTORCH)
"""What `tricomp demo` calls: see tell."""
