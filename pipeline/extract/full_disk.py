"""A full disk: nobody's fault but the machine's, and the end of a run, in one line."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moclip.errors import MoclipError

_NUMBERS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
#: tensorstore passes the system's words on, but not its number.
_WORDS = {"No space left on device": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT}


@contextmanager
def naming_a_full_disk(store: str | Path) -> Iterator[None]:
    """:class:`MoclipError` that says what to do, in place of any error that a full disk is behind."""
    try:
        yield
    except Exception as error:
        full = what_is_full(error)
        if full is None:
            raise
        raise MoclipError(
            f"{full} where {store} is written; free some space and run the same command again: what was finished is "
            f"kept, and `moclip verify {store}` lists what is left over"
        ) from error


def what_is_full(error: BaseException | None) -> str | None:
    """Words for a full disk or quota that is behind an error; None if none is."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        number = next((known for words, known in _WORDS.items() if words in str(error)), number)
        if number in _NUMBERS:
            return _NUMBERS[number]
        error = error.__cause__ or error.__context__
    return None
