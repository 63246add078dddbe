"""The exceptions of namr.

    NamrError
     ├── ConfigError        a flag, a configuration file or an argument is wrong
     ├── ShapeError         an array has the wrong shape, type or values (NaN)
     ├── StorageError       an object store or a folder refused
     │    ├── ObjectMissing     nothing lies at that URI
     │    └── Conflict          somebody else changed it first
     ├── ManifestError      a stored thing is damaged, incomplete, foreign or from a newer format
     ├── ModelMismatch      made by another model than the one at hand
     ├── ImageRefused       bytes that are no image we can use; carries the reason
     ├── Busy               a service has too much to do; carries when to ask again
     └── TimedOut           a search took longer than it may

Every message says what failed, the value, what was expected and what to do. Anything else that
escapes is a fault of ours.
"""


class NamrError(Exception):
    """Any failure that a user can understand and act on."""


class ConfigError(NamrError):
    """A flag, a configuration file or an argument is wrong."""


class ShapeError(NamrError):
    """An array has the wrong shape, type or values."""


class StorageError(NamrError):
    """An object store or a folder refused."""


class ObjectMissing(StorageError):
    """Nothing lies at that URI."""


class Conflict(StorageError):
    """Somebody else changed it first: read again, decide again."""


class ManifestError(NamrError):
    """A stored thing is damaged, incomplete, foreign or from a newer format."""


class ModelMismatch(NamrError):
    """Made by another model than the one at hand."""


class ImageRefused(NamrError):
    """Bytes that are no image we can use."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"image refused: {reason}")
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageRefused"], tuple[str]]:
        return type(self), (self.reason,)


class Busy(NamrError):
    """A service has too much to do; ask again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["Busy"], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)


class TimedOut(NamrError):
    """A search took longer than it may."""
