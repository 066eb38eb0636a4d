"""The demo behind `tricomp demo --framework jax`, with Flax and Optax. The story itself is tricomp's: tricomp.demos.

The hard thing is what equality proves. Each process compiles its program anew, so it shows that this program repeats
exactly on this machine, and that what was restored is all that it depends on, to the last bit: every loss and every
leaf of the final state is compared. It does not show that XLA repeats elsewhere, with more threads or another jaxlib.
"""

from __future__ import annotations

from functools import partial

import flax
import jax
import optax

from tricomp.demos.story import Framework, tell
from tricomp_jax.demo_run import stream_of

JAX = Framework(
    title=f"JAX {jax.__version__} on CPU, Flax {flax.__version__}, Optax {optax.__version__}",
    versions={"jax": jax.__version__, "flax": flax.__version__, "optax": optax.__version__},
    module="tricomp_jax.demo_run",
    stream_of=stream_of,
    rest="step counts, random key",
    remark="  Each process compiled its program anew, for one thread of arithmetic: so the\n"
    "  program repeats on this machine, and all that it depends on was restored.",
)

main = partial(tell, JAX)
"""What `tricomp demo` calls: see tell."""
