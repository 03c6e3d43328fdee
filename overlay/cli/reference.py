"""The tables of docs/reference.md that are made from the flags themselves: `python -m overlay.cli.reference` writes them
there; a test compares."""

from __future__ import annotations

import sys
from pathlib import Path

from overlay.settings.flags import FLAGS, LIVE, Flag, variable

BEGIN, END = "<!-- flags: made by `make reference` -->", "<!-- end of flags -->"


def flags_table() -> str:
    """All flags, as a Markdown table."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    lines += [_row(flag) for flag in FLAGS]
    return "\n".join(lines)


def _row(flag: Flag) -> str:
    default = (
        "" if flag.default in ("", (), None) else str(flag.default).lower() if flag.kind == "bool" else flag.default
    )
    shown = f"`{default}`" if default != "" else ""
    marks = [word for word, holds in (("ours", flag.ours), ("live", flag.name in LIVE)) if holds]
    name = f"`--{flag.name}`{' (' + ', '.join(marks) + ')' if marks else ''}"
    text = flag.text or f"**refused**: {flag.refuse}"
    return f"| {name} | {shown} | {text.replace('|', '/')} |"


def rewritten(page: str) -> str:
    """The page with today's table. Raises ValueError where it has no place for it."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page lacks the lines {BEGIN!r} and {END!r}")
    note = f"(The environment has `{variable('etcd-prefix')}` for `--etcd-prefix`, and so on.)"
    return f"{before}{BEGIN}\n\n{flags_table()}\n\n{note}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewritten(path.read_text()))
