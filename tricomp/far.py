"""The door to fsspec: from a URL to its file system, and from what it raises to errors that say what to do.

The only module that imports fsspec, and only when a URL is given. The hard thing: each file system raises errors of its
own packages, which are known here by name, since none of those packages need be installed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from tricomp.errors import InvalidArgument, StorageError

_CREDENTIALS = re.compile(r"credential|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken", re.IGNORECASE)
_TIMEOUTS = re.compile(r"time(d )?out|EndpointConnection|ConnectorError|ConnectionError|ConnectError", re.IGNORECASE)
_CACHING = re.compile(r"\b(simplecache|filecache|blockcache|cached)::")


def file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The fsspec file system at a URL, and the path of the URL in it. Raises InvalidArgument, StorageError."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise InvalidArgument(f"{url}: URLs need fsspec. Run: pip install 'tricomp[remote]'") from None
    if _CACHING.search(url):
        raise InvalidArgument(f"{url}: tricomp reads ranges itself. Give the URL without a cache of fsspec's.")
    try:
        found, path = url_to_fs(url, **options)
    except ImportError as error:
        raise InvalidArgument(f"{url}: its file system is not installed: {error}. Install it with pip.") from None
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{url}: fsspec cannot open it: {error}. Check URL and storage_options.") from None
    except Exception as error:
        raise failure(error, f"{url}: cannot be opened", is_reading=True) from error
    return found, path.rstrip("/")


def knows_create(found: Any) -> bool:
    """Whether a file system can be told to create and not to replace; older ones take that word and replace."""
    write = found._pipe_file if hasattr(found, "_pipe_file") else found.pipe_file
    return "mode" in inspect.signature(write).parameters


def is_unsupported(error: Exception) -> bool:
    """Whether a file system or its server does not know what was asked of it: some S3 servers say so in words only."""
    told = f"{error} {error.__cause__}".replace(" ", "").lower()
    return isinstance(error, TypeError | ValueError | NotImplementedError) or "notimplemented" in told


def abandon(file: Any) -> None:
    """Drop an upload. A buffered file must not be closed, here or by the garbage collector: that would complete it."""
    from fsspec.spec import AbstractBufferedFile

    if isinstance(file, AbstractBufferedFile):
        try:
            file.discard()
        finally:
            file.closed = True
    else:
        file.close()


def failure(error: BaseException, what: str, is_reading: bool = False) -> StorageError:
    """The StorageError for what a file system raised."""
    kinds: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(kinds) < 8:
        kinds.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(kinds)
    if _CREDENTIALS.search(text):
        advice = (
            "There are no valid credentials: set them where the file system looks (for S3: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile), or pass storage_options, say {'key': ..., 'secret': ...}."
        )
    elif isinstance(error, PermissionError):
        advice = "Access was denied: check the credentials and what they may do there."
    elif isinstance(error, FileNotFoundError):
        advice = "Check the URL: the bucket or folder may not exist."
    elif isinstance(error, TimeoutError) or _TIMEOUTS.search(text):
        advice = "The server did not answer: check the network and the endpoint, and try again."
    elif isinstance(error, NotImplementedError):
        advice = "This file system cannot do that: use another."
    else:
        advice = "Try again; if it goes on, look at the service's status."
    if not is_reading:
        advice += " Nothing that was there has changed."
    shown = f"{error}".strip() or "no reason was given"
    found = StorageError(f"{what}: {type(error).__name__}: {shown}. {advice}")
    found.errno = getattr(error, "errno", None)
    return found
