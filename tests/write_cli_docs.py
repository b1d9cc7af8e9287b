"""Writes docs/cli.md from the commands' own help: python tests/write_cli_docs.py"""

from pathlib import Path

import click

from moclip import cli

DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


def reference() -> str:
    """The whole reference, as Markdown."""
    parts = ["# The commands\n\nMade from the commands' own `--help` by `python tests/write_cli_docs.py`.\n"]
    for path, command in _commands(cli.main, "moclip", None):
        parts.append(f"## {path.command_path}\n\n```\n{command.get_help(path)}\n```\n")
    return "\n".join(parts)


def _commands(command: click.Command, name: str, parent: click.Context | None):  # type: ignore[no-untyped-def]
    settings = {**command.context_settings, "terminal_width": 100, "max_content_width": 100}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield context, command
    for child in sorted(getattr(command, "commands", {})):
        yield from _commands(command.commands[child], child, context)  # type: ignore[attr-defined]


if __name__ == "__main__":
    DOCS.write_text(reference())
