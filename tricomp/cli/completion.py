"""`tricomp completion`: a script that makes a shell complete subcommands, options and file names. Made by shtab.

The hard thing: which arguments are files is known to the parsers alone, which mark them (console.takes_files).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tricomp.cli import console

_SHELLS = ("bash", "zsh", "fish")
_HOW = {
    "bash": "tricomp completion bash > ~/.local/share/bash-completion/completions/tricomp",
    "zsh": "tricomp completion zsh > ~/.zfunc/_tricomp     (a folder of your fpath)",
    "fish": "tricomp completion fish > ~/.config/fish/completions/tricomp.fish",
}


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: list[argparse.ArgumentParser],
) -> None:
    """Add the subcommand completion."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes the command in a shell",
        description="Print a script that completes the command in a shell. Needs shtab: pip install 'tricomp[cli]'.",
        epilog="\n".join(f"  {line}" for line in _HOW.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=completion)


def completion(options: argparse.Namespace) -> int:
    """Print the script. Returns the exit code."""
    try:
        import shtab
    except ModuleNotFoundError:
        console.complain(options, "shtab is not installed. Run: pip install 'tricomp[cli]'")
        return console.FAILED
    if options.shell not in shtab.SUPPORTED_SHELLS:
        console.complain(options, f"this shtab does not know {options.shell}. Run: pip install --upgrade shtab")
        return console.FAILED
    from tricomp.cli import parser

    whole = parser()
    for action in _actions(whole):
        if getattr(action, "is_file", False):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, options.shell))
    return console.DONE


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its subcommands, and theirs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
