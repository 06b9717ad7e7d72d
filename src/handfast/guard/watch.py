"""Which files have changed on the disk, found by looking at them now and then.

Looks at inodes, never into files. It has no thread and no clock: whoever calls it sets the pace. Polling sees what
notification misses: network disks, bind mounts, and links swapped by Kubernetes (`..data`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Polls in a row that files may go on changing before what has settled is told all the same.
MAX_UNREST = 20

_PATH_ONLY = getattr(os, "O_PATH", None)  # Linux

Look = tuple[object, ...]


@dataclass(slots=True)
class _File:
    told: Look  # as the caller knows it
    seen: Look  # as it was at the last poll


class Watch:
    """Files to be read again when they change. Make it, or `follow`, before the files are first read.

    A change is told once all of the files stayed as they are from one poll to the next: neither a file half
    written nor a certificate whose key is still to come is told. A file that goes missing is a change too, once,
    and so is its return.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[Path, _File] = {}
        self._unrest = 0
        self.follow(paths)

    def follow(self, paths: Iterable[Path]) -> None:
        """Watch these from now on, and no others; of those that stay, a change not yet told is not lost."""
        before = self._files
        self._files = {}
        for path in paths:
            file = before.get(path)
            if file is None:
                now = look(path)
                file = _File(now, now)
            self._files[path] = file

    def changed(self) -> list[Path]:
        """Look at the files; return those that changed since they were last told, in the order given."""
        moving, changed = False, []
        for path, file in self._files.items():
            now = look(path)
            if now != file.seen:
                file.seen = now
                moving = True
            elif now != file.told:
                changed.append(path)
        self._unrest = self._unrest + 1 if moving else 0
        if moving and self._unrest < MAX_UNREST:
            return []
        self._unrest = 0
        for path in changed:
            self._files[path].told = self._files[path].seen
        return changed


def look(path: Path) -> Look:
    """What tells one state of a file from another: its real path, inode, times and size; the error if it is not there.

    The time of the inode's own change is part of it, since a copy can keep the time of the content.
    """
    try:
        if _PATH_ONLY is None:
            return _told(os.stat(path), os.path.realpath(path))
        descriptor = os.open(path, _PATH_ONLY | os.O_CLOEXEC)  # opens nothing to read, so it never waits on a FIFO
    except OSError as error:
        return (error.errno,)
    except ValueError:  # a NUL byte in the path
        return ()
    try:
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")  # realpath asks once per folder
        except OSError:  # no /proc here
            target = os.path.realpath(path)
        return _told(os.fstat(descriptor), target)
    finally:
        os.close(descriptor)


def _told(found: os.stat_result, target: str) -> Look:
    return (target, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
