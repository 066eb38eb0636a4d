"""`tricomp demo`: a training run killed and resumed, shown by the adapter of a framework.

The hard thing: the core never imports an adapter, so the framework's demo is found through the entry points of the
group "tricomp.demo", by name.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points

_DEMO_GROUP = "tricomp.demo"
# By framework: the extra that installs what its demo needs, and the packages that it needs.
_NEEDS = {"torch": ("torch", ("torch",)), "jax": ("demo-jax", ("jax", "jaxlib", "flax", "optax"))}


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommand demo. It is for show, and takes none of the common options."""
    parser = commands.add_parser(
        "demo",
        help="train a small GPT, kill it in the middle of a save, resume, compare bit for bit",
        description="Train a small GPT, kill it in the middle of a save, resume it, and compare it bit for bit with an "
        "uninterrupted run. Then show what its checkpoints cost. Takes a minute or two on two cores. "
        "Exit code 0 only if the runs are identical.",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default 40)")
    parser.add_argument("--every", type=int, metavar="N", help="steps between saves (default 5)")
    parser.add_argument("--dir", metavar="PATH", help="keep checkpoints and logs in this new or empty folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a few seconds, no meaningful sizes")
    parser.add_argument(
        "--framework", default="torch", metavar="NAME", help="what to train with: torch (default) or jax"
    )
    parser.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> int:
    """Find the framework's demo and run it: main(steps=, every=, directory=, as_json=, is_quick=) -> exit code."""
    found = {entry.name: entry for entry in entry_points(group=_DEMO_GROUP)}
    if options.framework not in found:
        known = ", ".join(sorted(found)) or "none"
        print(f"tricomp demo: there is no demo for {options.framework!r}; installed: {known}.", file=sys.stderr)
        return 1
    extra, needed = _NEEDS.get(options.framework, (options.framework, (options.framework,)))
    try:
        run = found[options.framework].load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in needed:
            raise
        print(f"tricomp demo: {missing} is not installed. Run: pip install 'tricomp[{extra}]'", file=sys.stderr)
        return 1
    code: int = run(
        steps=options.steps,
        every=options.every,
        directory=options.dir,
        as_json=options.json,
        is_quick=options.quick,
    )
    return code
