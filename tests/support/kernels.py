"""The table of other kernels in docs/reliability.md, from what `.ci/kernel-run` left: `python -m tests.support.kernels PAGE
FOLDER...`, a folder for each kernel."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

_RESULT = re.compile(r"(?P<test>tests/\S+::.+) (setup|call|teardown) (?P<outcome>passed|failed|skipped) [0-9.]+")
BEGIN, END = "<!-- made by `make kernels`: begin -->", "<!-- made by `make kernels`: end -->"


def rows(folder: Path) -> tuple[str, dict[str, Counter[str]]]:
    """The kernel's version, and by file how many tests passed, failed or were skipped: as far as the run came."""
    release = (folder / "output.txt").read_text(errors="replace").splitlines()[0]
    if not (folder / "status").exists():
        release += "; cut off by the time"
    outcomes: dict[str, str] = {}
    for line in (folder / "results.txt").read_text(errors="replace").splitlines():
        found = _RESULT.fullmatch(line)
        if found is not None and outcomes.get(found["test"]) != "failed":
            outcomes[found["test"]] = found["outcome"]
    counts: dict[str, Counter[str]] = {}
    for test, outcome in outcomes.items():
        counts.setdefault(test.partition("::")[0], Counter())[outcome] += 1
    return release, counts


def table(folders: list[Path]) -> str:
    """As Markdown: files by kernels. A kernel whose run did not end has its reason in place of figures."""
    columns = []
    for folder in folders:
        try:
            columns.append((folder.name, *rows(folder)))
        except (OSError, IndexError) as error:
            columns.append((folder.name, f"not run: {error}", {}))
    lines = [f"- {name}: `{release}`" for name, release, _ in columns]
    files = sorted({file for _, _, found in columns for file in found})
    lines += ["", f"| tests | {' | '.join(name for name, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for file in files:
        cells = [_cell(found.get(file)) for _, _, found in columns]
        lines.append(f"| {file} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Counter[str] | None) -> str:
    if not found:
        return "not run"
    return ", ".join(f"{found[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if found[outcome])


def rewritten(page: str, made: str) -> str:
    """The page with this table. Raises ValueError where it has no place for it."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page lacks the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(rewritten(path.read_text(), table([Path(folder) for folder in sys.argv[2:]])))
