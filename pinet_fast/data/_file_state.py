"""Tells whether a mapped file was written to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class FileState:
    """Which file it is, and when and how large it was written."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """Return the state of a file, or None where there is none."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_changed(self, path: Path) -> bool:
        """Return whether this very file is there with another size or time."""
        try:
            found = os.stat(path)
        except OSError:
            return False
        if (found.st_ino, found.st_dev) != (self.inode, self.device):
            return False
        return (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns)
