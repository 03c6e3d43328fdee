"""Whether this process only says what it would remove (`overlay uninstall --dry-run`): nothing is sent to the kernel,
written or deleted then. Asked where that would be done; set once, before anything is."""

from __future__ import annotations


class _Dry:
    run = False


dry = _Dry()
