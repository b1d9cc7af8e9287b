"""What every command shares: kinds of arguments, and words on the terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

#: A store: a path, or an address in a bucket.
STORE = click.STRING
EXISTING = click.Path(path_type=Path)
NEW = click.Path(path_type=Path)

#: Seconds between two lines in a log.
_EVERY = 30.0

Option = Callable[[Callable[..., None]], Callable[..., None]]


def together(*decorators: Option) -> Option:
    """Several options as one decorator, in the order given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(decorators):
            command = option(command)
        return command

    return decorate


def say(line: str) -> None:
    """Print a line with words from a store: a stranger's control characters do not reach the terminal."""
    click.echo("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def one_line(text: str) -> str:
    return " ".join(text.split())


def shown(names: Any, most: int = 3) -> str:
    """A few names on one line, quoted and escaped."""
    some = ", ".join(repr(name) for name in names[:most])
    return some + (", …" if len(names) > most else "")


def count(n: int, what: str) -> str:
    """``1 video``, ``2 videos``; ``2 entries``."""
    if n == 1:
        return f"1 {what}"
    return f"{n} {what[:-1]}ies" if what.endswith("y") else f"{n} {what}s"


def size(n: float) -> str:
    """Bytes, in the unit that suits them."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on the error stream for what has no known end. Its function takes what to say; nothing takes it away."""
    from rich.console import Console

    line = Console(stderr=True).status("")

    def say_now(what: str) -> None:
        line.update(what)
        if what:
            line.start()
        else:
            line.stop()

    try:
        yield say_now
    finally:
        line.stop()


@contextmanager
def progress(what: str, total: int | None, said: str) -> Iterator[Callable[..., None]]:
    """A bar on the error stream; where that is no terminal, a line every :data:`_EVERY` seconds.

    ``said`` is the text beside it, with places for what each update gives.

    The bar's function takes how much is done, of how much (if that was not known before), and those values.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console, told = Console(stderr=True), time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("starting", total=total)

        def advance(done: float, total: float | None = total, **values: Any) -> None:
            nonlocal told
            text = said.format(done=done, total=total, **values)
            bar.update(line, completed=done, total=total, description=text)
            if not console.is_terminal and time.monotonic() - told >= _EVERY:
                told = time.monotonic()
                click.echo(f"{what}: {text}", err=True)

        yield advance
