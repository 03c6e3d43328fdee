"""Files: read, written atomically, removed."""

from __future__ import annotations

import contextlib
import os
import stat

from lease.regular import content as content_of
from overlay.process.dry import dry


def read_text(path: str) -> str:
    """The content without blanks around it, "" where it cannot be read."""
    return (read(path) or b"").decode(errors="replace").strip()


def read(path: str) -> bytes | None:
    """The content, None where it cannot be read."""
    try:
        return content_of(path)
    except OSError:
        return None


def text_of(path: str) -> str:
    """The content as text, whatever bytes it has. Raises OSError."""
    return content_of(path).decode("utf-8", "replace")


def up_to_date(path: str, content: str) -> bool:
    """Whether a file holds exactly that."""
    try:
        return text_of(path) == content
    except OSError:
        return False


def write_atomically(path: str, content: str, new_mode: int = 0o644) -> None:
    """Put a file in place whole: temporary name beside it, fsync, rename. new_mode whatever the umask, an existing file's
    mode kept, folders 0755: as flannel does. Raises OSError."""
    if dry.run:
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        mode = new_mode
    # Not tempfile: it would cost the agent 1 MiB. The folder is root's, the process has its run directory for itself. One
    # name for all: what a crash left is gone with the next write.
    temporary = f"{folder}/.{name}.new"
    try:
        remove(temporary)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        error.filename = path  # not the temporary name; and writing says none at all
        raise
    except BaseException:
        remove(temporary)
        raise


def remove(path: str) -> None:
    """Remove a file; one that is gone is no error. Raises OSError."""
    if dry.run:
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
