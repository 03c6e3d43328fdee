"""`overlay man`: the manual pages, made from the commands and flags themselves (man(7))."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from overlay import __version__
from overlay.settings.flags import FLAGS, variable


@click.command()
@click.option(
    "--to",
    "folder",
    default="/usr/local/share/man",
    show_default=True,
    type=click.Path(path_type=Path),
    help="below it man1 and man8 are made",
)
def man(folder: Path) -> None:
    """Write the manual pages of overlay, its commands, and overlayd."""
    try:
        for name, section, text in pages():
            path = folder / f"man{section}" / f"{name}.{section}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            click.echo(path)
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


def pages() -> Iterator[tuple[str, int, str]]:
    """Name, section and text of each page."""
    from overlay.cli.app import app

    yield "overlayd", 8, _agent()
    yield from _command(app, click.Context(app, info_name="overlay"))


def _command(command: click.Command, context: click.Context) -> Iterator[tuple[str, int, str]]:
    name = context.command_path.replace(" ", "-")
    about = inspect.cleandoc(command.help or "").split("\n\n")
    lines = _head(name, 1, about[0].split(". ")[0].rstrip("."))
    lines += [".SH SYNOPSIS", f".B {context.command_path}", _text(" ".join(command.collect_usage_pieces(context)))]
    lines += [".SH DESCRIPTION", *_paragraphs(about)]
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    if options:
        lines.append(".SH OPTIONS")
    for option in options:
        record = option.get_help_record(context)
        if record is not None:
            lines += [".TP", f".B {_text(record[0])}", _text(record[1] or "")]
    children = command.commands if isinstance(command, click.Group) else {}
    if children:
        lines.append(".SH COMMANDS")
        for child_name, child in sorted(children.items()):
            lines += [".TP", f".BR {name}\\-{_text(child_name)} (1)", _text(child.get_short_help_str(200))]
    lines += [".SH SEE ALSO", ".BR overlay (1)," if name != "overlay" else "", ".BR overlayd (8)"]
    yield name, 1, _page(lines)
    for child_name, child in sorted(children.items()):
        yield from _command(child, click.Context(child, info_name=child_name, parent=context))


def _agent() -> str:
    lines = _head("overlayd", 8, "VXLAN overlay agent, compatible with flanneld")
    lines += [".SH SYNOPSIS", ".B overlayd", _text("[--FLAG=VALUE ...]"), ".SH DESCRIPTION"]
    about = [
        "Leases a subnet of the pod network from etcd or takes the podCIDR of its Node; makes a vxlan device; keeps peers.",
        f"Each flag is also read from the environment: {variable('etcd-endpoints')} for --etcd-endpoints.",
    ]
    lines += [*_paragraphs(about), ".SH OPTIONS"]
    for flag in FLAGS:
        value = "" if flag.kind == "bool" else "=N" if flag.kind == "int" else "=VALUE"
        default = str(flag.default).lower() if flag.kind == "bool" else flag.default
        text = flag.text or f"refused: {flag.refuse}"
        lines += [
            ".TP",
            f".B \\-\\-{_text(flag.name)}{value}",
            _text(text + (f" [{default}]" if default not in ("", ()) else "")),
        ]
    lines += [
        ".SH EXIT STATUS",
        _text("0 stopped by a signal; 1 cannot go on (another node has our address); 2 the command line is wrong."),
        ".SH SEE ALSO",
        ".BR overlay (1)",
    ]
    return _page(lines)


def _head(name: str, section: int, about: str) -> list[str]:
    title = f'.TH {_text(name.upper())} {section} "" "overlay {__version__}" "overlay"'
    return [title, ".SH NAME", f"{_text(name)} \\- {_text(' '.join(about.split()))}"]


def _paragraphs(texts: list[str]) -> Iterator[str]:
    for place, text in enumerate(texts):
        if place:
            yield ".PP"
        yield _text(" ".join(text.split()))


def _text(text: str) -> str:
    """As troff reads it: no word of ours is a request, hyphens are those of a terminal."""
    escaped = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped)


def _page(lines: list[str]) -> str:
    return "\n".join(line for line in lines if line) + "\n"
