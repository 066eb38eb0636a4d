"""Every error tricomp raises on bad input. Imports nothing.

An error names the leaf, what was expected, what came, and what to do next. `TricompError` catches all of them; the
builtin beside it in the bases is what code unaware of tricomp would have caught.
"""


class TricompError(Exception):
    """Base of every error below."""


class InvalidArgument(TricompError, ValueError):
    """An argument is of the wrong kind, shape or value."""


class InvalidIndex(InvalidArgument, IndexError):
    """An index of a slice is out of bounds, or no index."""


class UnsupportedDtype(InvalidArgument, TypeError):
    """A leaf has a dtype that the format does not know."""


class UnsupportedNode(InvalidArgument, TypeError):
    """A tree holds an object that is neither a leaf nor a plain value."""


class UnsupportedFormat(InvalidArgument):
    """A file is of no format that tensors are read from, or a format of that name is not known."""


class BudgetError(TricompError, ValueError):
    """No conversion to integers keeps the outputs within the budget that was asked for."""


class MissingLeaf(TricompError, KeyError):
    """A leaf was asked for that is not there."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class CorruptFrame(TricompError):
    """Bytes of one frame are damaged, or decode to something else than was encoded."""


class CorruptFile(TricompError):
    """A file is cut, or its header, index or tail is damaged."""


class UnsupportedVersion(TricompError):
    """A file was written by a newer format version."""


class LimitExceeded(TricompError):
    """A file asks for more memory, depth or entries than the reader's limits allow."""


class OutOfDeviceMemory(TricompError, MemoryError):
    """An accelerator has no memory left for what compressing needs."""


class BackendError(TricompError, RuntimeError):
    """A backend cannot do what was asked of it here: a kernel does not compile, or tensors are on several devices."""


class WrongReference(TricompError):
    """A reference is missing, or is not the one the data was encoded against."""


class MissingParent(WrongReference):
    """A delta checkpoint's parent is not in the store."""


class MissingStep(TricompError, KeyError):
    """A step was asked for that is not in the store."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class MissingFile(TricompError, FileNotFoundError):
    """There is no file of that name."""


class StoreLocked(TricompError):
    """Another writer holds the store."""


class StorageError(TricompError, OSError):
    """The file system refused: full, read-only, no permission."""
