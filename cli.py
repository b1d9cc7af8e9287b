"""The command line: parse, call one function, print. Errors of the domain become one line and exit code 1."""

import logging
import select
import sys
from pathlib import Path
from typing import Any

import click

from moclip import __version__
from moclip.errors import MoclipError
from moclip.pipeline.commands import extracting, learning, looking, sharing
from moclip.pipeline.commands.console import NEW, one_line

INTERRUPTED = 130


class _Commands(click.Group):
    """Turns the errors that moclip raises on purpose into one line, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MoclipError, ConnectionError) as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                raise  # `moclip … | head`: click ends without a word
            raise click.ClickException(one_line(str(error))) from error
        except OSError as error:
            raise click.ClickException(f"the operating system says: {one_line(str(error))}") from error
        except KeyboardInterrupt:
            click.echo("Interrupted. What was finished is kept; run the same command again to go on.", err=True)
            sys.exit(INTERRUPTED)


def _nobody_reads() -> bool:
    """Whether the broken pipe is the one that this prints into, and not a connection to another machine."""
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moclip")
@click.option("-v", "--verbose", is_flag=True, help="Also print log messages.")
def main(verbose: bool) -> None:
    """Decode each compressed video once into a feature store; train from the store ever after.

    \b
    Example:
      moclip extract videos/ corpus.zarr --splits splits/
      moclip train tsn corpus.zarr --split 1 --out runs/tsn
      moclip train fusion corpus.zarr --split 1 --motion-run runs/tsn --out runs/fusion
      moclip evaluate runs/fusion corpus.zarr

    Exit codes: 0 done, 1 an error that one line explains, 2 a wrong command line, 130 interrupted.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("moclip").setLevel(logging.INFO if verbose else logging.WARNING)
    # Where a job runs, and how to watch it, is always said.
    logging.getLogger("moclip.pipeline.extract.cluster").setLevel(logging.INFO)


@main.command()
@click.option("--out", type=NEW, default=Path("moclip-demo"), help="Where it goes.", show_default=True)
def demo(out: Path) -> None:
    """The whole way on a small generated corpus, offline, in about a minute.

    \b
    Example:
      moclip demo --out /tmp/demo
    """
    from moclip.pipeline.demo import run_demo

    run_demo(out, click.echo, lambda arguments: main.main(list(arguments), standalone_mode=False))


for command in (
    extracting.extract,
    extracting.embed,
    extracting.label,
    looking.info,
    looking.diff,
    looking.verify,
    sharing.export,
    sharing.merge,
    sharing.remove,
    learning.train,
    learning.evaluate,
    learning.ablate,
    learning.zeroshot,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
