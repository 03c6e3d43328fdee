"""The agent as a process: `overlayd`, `python -m overlay`."""

import gc
import sys

from overlay.process import defer, memory


def main() -> None:
    """Keep little memory, defer what an agent never uses, then be one."""
    gc.disable()  # nothing of a start is garbage; main.garbage_as_usual
    memory.keep_little()
    defer.install()
    from overlay.main import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
