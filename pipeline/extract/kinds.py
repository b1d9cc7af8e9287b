"""The kinds of features that an extraction makes, and the names that a feature may have."""

import re

from moclip.errors import SourceError
from moclip.store.schema import EXTRACTED

KINDS = MOTION, ACCUMULATED, EMBEDDING, IMAGE = EXTRACTED
#: What is extracted where nobody says what.
DEFAULT_KINDS = (MOTION, ACCUMULATED, EMBEDDING)

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")


def check_feature_name(name: str) -> str:
    """The name that a person chose for a feature, if it can be one; else :class:`SourceError`."""
    if not _NAME.fullmatch(name):
        raise SourceError(f"{name!r} cannot name a feature; expected a-z, 0-9 and '-', such as motion-16")
    return name
