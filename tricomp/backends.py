"""Which backends there are in this process, in words, as the codec tells.

The hard thing is to be honest: a backend is live if the codec would use it here and now.
"""

from __future__ import annotations

from tricomp import codec


def live() -> dict[str, str]:
    """Backend to what can be said of it: what it runs on, or "none" and why it is not there."""
    return codec.live()
