"""The program that each worker runs: all have to run the driver's, or their gradients are of other models.

A node may have another namr installed, or another torch. Not covered: a run that goes on with a newer program
than it began with, which it may.
"""

import hashlib
from pathlib import Path

import torch

from namr import collectives
from namr.errors import ConfigError

_NAMR = Path(__file__).parents[1]


def digest(folder: Path = _NAMR) -> str:
    """SHA-256 of this process's namr, and of which torch it has."""
    whole = hashlib.sha256(torch.__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        whole.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return whole.hexdigest()


def difference(expected: str) -> ConfigError | None:
    """What to do where a rank's program is not the expected one; collective, the same on every rank."""
    is_other = torch.tensor([int(digest() != expected)])
    others = collectives.gather(is_other).nonzero().flatten().tolist()
    if not others:
        return None
    return ConfigError(
        f"ranks {others} of {collectives.world_size()} run another version of namr or of torch than the job "
        "that started them; submit the job with --working-dir, or install one version on all nodes"
    )
