"""apply: a copy of the model brought to a published version: files on a server's disk, or live arrays in place.

Imports live and served_folder. The hard thing is in these two: files change all together or not at all, live arrays one
after the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tricomp.errors import InvalidArgument
from tricomp.publishing.application import Application
from tricomp.publishing.lineage import Lineage
from tricomp.publishing.live import apply_to_tensors
from tricomp.publishing.served_folder import apply_to_folder
from tricomp.publishing.tensors import tensors_of

Path = str | os.PathLike[str]


def apply(
    local: Path | Mapping[str, Any],
    folder: Path,
    version: int | None = None,
    *,
    base: Path | None = None,
    at: int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Application:
    """Bring a copy of the model to a published version, through all versions between or from the newest full one.

    local: a folder of safetensors files, which keeps a mark of its version; or a flat dict of numpy arrays, which are
    written to in place. folder: where versions are published, a path or URL. version: None: the newest. base: the
    folder of the model that version 0 is, for a local folder that is empty. at: the version that a dict of arrays
    holds; None: any, if there is a full version to begin at. timeout: seconds to wait for another process that applies
    to the same folder; None: as long as it takes. Needs free space of the files that change. Applying what is there
    already does nothing; a folder whose apply was interrupted is repaired by applying again.
    Raises MissingFile (not published yet), MissingParent (a version between is missing), WrongReference (what is there
    is not what was published: naming a tensor), CorruptFile, CorruptFrame (damage), InvalidArgument, StoreLocked,
    StorageError. A folder is as it was then. Of arrays, some may be at the new version: to apply again with the same at
    goes on where it ended, so do that before they are used, or begin again from a full version.
    """
    lineage = Lineage(folder, storage_options)
    if isinstance(local, (str, os.PathLike)):
        if at is not None:
            raise InvalidArgument("at: is for arrays; a folder has a mark of its version.")
        return apply_to_folder(os.fspath(local), lineage, version, base, threads, timeout)
    if base is not None:
        raise InvalidArgument("base: is for folders; arrays hold the base themselves. Say which with at=.")
    return apply_to_tensors(tensors_of(local, "apply"), lineage, version, at, threads)
