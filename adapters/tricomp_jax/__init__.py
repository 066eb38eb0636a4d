"""JAX adapter of tricomp: not in this version yet.

The package exists so that its name is taken and its import is stable. It holds no functions, imports no jax, and says
so when one is asked for. Until it is filled, `tricomp.save` and `tricomp.load` take any tree of numpy arrays, which is
what `jax.device_get` returns.
"""

from typing import NoReturn

if __name__ != "tricomp_jax":
    raise ImportError(f"import tricomp_jax by that name, not as {__name__!r}; 'adapters' is a folder, not a package")

__all__: list[str] = []


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"tricomp_jax has no {name!r}: JAX support is not in this version of tricomp. "
        "Use tricomp.save and tricomp.load on jax.device_get(tree)."
    )
