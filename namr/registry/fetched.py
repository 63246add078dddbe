"""A folder that several processes want at once: one of them fetches it, all get it whole.

A folder comes under its name by one rename, when all of its files are there. Whoever is killed while it
fetches leaves a `.<name>.partial`, which the next one removes.

Not covered: removing what is not wanted any more.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from namr.store.folders import locked


def folder(target: Path, fetch: Callable[[Path], Path], *, names: Sequence[str]) -> None:
    """Make sure that the folder `target` has all files `names`.

    fetch: brings a folder that has them below the empty folder that it is given, and says where it is. A
    target that lacks one of the files is fetched anew.
    """
    if _is_whole(target, names):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with locked(target.with_name(f".{target.name}.lock")):
        if _is_whole(target, names):  # fetched by another process while this one waited
            return
        for left in (partial, target):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        fetch(partial).rename(target)
        shutil.rmtree(partial)


def _is_whole(target: Path, names: Sequence[str]) -> bool:
    return all((target / name).is_file() for name in names)
