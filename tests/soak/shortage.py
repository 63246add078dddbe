"""A process, this one or another, that gets hardly any more memory, or no more disk.

One without memory may live on, waiting for threads that could not be started: the kernel's killer would come,
and so does who calls this, after KILLED_AFTER_S.
"""

import resource
from pathlib import Path

KILLED_AFTER_S = 30.0
_HARDLY_ANY_BYTES = 16 << 20


def of_memory(pid: int) -> None:
    """FileNotFoundError or ProcessLookupError where it has ended."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _HARDLY_ANY_BYTES
    resource.prlimit(pid, resource.RLIMIT_AS, (most, most))


def of_disk(pid: int) -> None:
    """It can't write a byte to any file, as on a full disk. ProcessLookupError where it has ended."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
