"""Writes docs/reference and other generated files: `python -m deer_vla_ros.commands.reference_pages`."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable
from pathlib import Path

from deer_vla_ros.commands import COMMANDS, PROGRAM
from deer_vla_ros.ros.graph import type_name
from deer_vla_ros.ros.interface import INPUTS, OUTPUTS, SERVICES, Topic
from deer_vla_ros.ros.parameters import DECLARATIONS, render_yaml
from deer_vla_ros.ros.security import render_policy

ROOT = Path(__file__).resolve().parents[2]
NOTE = "<!-- Written by `python -m deer_vla_ros.commands.reference_pages`; a test keeps it current. -->"
HELP_WIDTH = 100


def render() -> dict[Path, str]:
    """The text of every generated file, by path below the repository's root."""
    folder = Path("docs/reference")
    return {
        Path("config/deer_vla.yaml"): render_yaml(),
        Path("config/sros2/deer_vla.policy.xml"): render_policy(),
        folder / "topics.md": _page(
            "Topics", "All names are relative; `~` is the node's own name.", _topics()
        ),
        folder / "services.md": _page(
            "Services",
            "Besides those of every managed node (`ros2 lifecycle`) and of its parameters.",
            _services(),
        ),
        folder / "parameters.md": _page(
            "Parameters",
            "A live parameter takes effect between two steps; the others are read at start.",
            _parameters(),
        ),
        folder / "messages.md": _page("Messages", "Units stand in brackets.", _messages()),
        folder / "commands.md": _page(
            "Commands", f"`{PROGRAM} COMMAND`, installed as `deer-vla COMMAND`.", _commands()
        ),
    }


def _page(title: str, introduction: str, lines: Iterable[str]) -> str:
    return "\n".join([NOTE, f"# {title}", "", introduction, "", *lines]).rstrip() + "\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterable[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _topics() -> Iterable[str]:
    def row(topic: Topic) -> tuple[str, ...]:
        when = f" Only with `{topic.when}`." if topic.when else ""
        return f"`{topic.name}`", f"`{type_name(topic.type)}`", topic.quality, topic.meaning + when

    for title, topics in (("Subscribed", INPUTS), ("Published", OUTPUTS)):
        yield from (
            f"## {title}",
            "",
            *_table(("topic", "type", "quality of service", "meaning"), map(row, topics)),
            "",
        )


def _services() -> Iterable[str]:
    rows = ((f"`{service.name}`", f"`{type_name(service.type)}`", service.meaning) for service in SERVICES)
    return _table(("service", "type", "meaning"), rows)


def _parameters() -> Iterable[str]:
    def limits(declaration) -> str:
        if declaration.choices:
            return " | ".join(declaration.choices)
        return f"{declaration.low:g} to {declaration.high:g}" if declaration.low is not None else ""

    rows = (
        (f"`{d.name}`", f"`{d.default!r}`", d.unit, limits(d), "live" if d.live else "", d.description)
        for d in DECLARATIONS
    )
    return _table(("parameter", "default", "unit", "range", "", "meaning"), rows)


def _messages() -> Iterable[str]:
    """Every message with its comments, and its fields with their comments."""
    for path in sorted((ROOT / "msg").glob("*.msg")):
        yield from (f"## {path.stem}", "")
        rows: list[tuple[str, ...]] = []
        for line in path.read_text().splitlines():
            field = re.fullmatch(r"(\S+)\s+([^#]*?)\s*#\s*(.*)", line)
            if field and not line.startswith("#"):
                rows.append((f"`{field[2]}`", f"`{field[1]}`", field[3]))
            elif rows and line.startswith(" ") and "#" in line:  # the comment of the field before goes on
                name, kind, meaning = rows.pop()
                rows.append((name, kind, f"{meaning} {line.partition('#')[2].strip()}"))
            elif line.startswith("# ---"):
                yield from (*_section(rows), f"### {line.removeprefix('# ---').strip().capitalize()}", "")
                rows = []
            elif line.startswith("#"):
                yield line.removeprefix("#").strip()
            elif not rows:
                yield ""
        yield from _section(rows)


def _section(rows: list[tuple[str, ...]]) -> Iterable[str]:
    if rows:
        yield from (*_table(("field", "type", "meaning"), rows), "")


def _commands() -> Iterable[str]:
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(
            prog=f"{PROGRAM} {name}",
            description=module.__doc__,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=HELP_WIDTH),
        )
        module.add_arguments(parser)
        yield from (f"## {name}", "", "```text", parser.format_help().rstrip(), "```", "")


def main() -> None:
    """Writes the generated files, and prints their names."""
    for path, text in render().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
        print(path)


if __name__ == "__main__":
    main()
