# SPDX-License-Identifier: Apache-2.0
"""Files of the guest's system that are replaced as a whole."""

from __future__ import annotations

import os
import stat


def is_regular(path: str) -> bool:
    """Whether there is a file of that name; what a symbolic link points to is someone else's."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def replace(path: str, text: str) -> None:
    """Give a file that is there another content, and its owner and mode.

    Whoever reads it meanwhile finds the one or the other.

    :raises OSError: it could not be
    """
    before = os.stat(path)
    new = f"{path}.snowflock"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
