"""The errors moclip raises, grouped by what the caller would do about them.

    MoclipError                 everything below
    ├── StoreNotFoundError      give another path                        (also FileNotFoundError)
    ├── StoreFormatError        upgrade moclip, or mend the store        (also ValueError)
    ├── FeatureError            extract the feature, or name another     (also LookupError)
    ├── SourceError             mend the list of videos or the splits    (also ValueError)
    ├── VideoError              look at that one video                   (also ValueError)
    ├── EncoderError            fetch or name the weights                (also RuntimeError)
    ├── RunError                mend the training or evaluation request  (also ValueError)
    └── TooManyFailuresError    look at the failed entries               (also RuntimeError)

A message says what was found, what was expected and what to do next.
"""


class MoclipError(Exception):
    """The root of every error that moclip raises on purpose."""


class StoreNotFoundError(MoclipError, FileNotFoundError):
    """There is no feature store at the given path."""


class StoreFormatError(MoclipError, ValueError):
    """The store is damaged, or of a format that this version does not read."""


class FeatureError(MoclipError, LookupError):
    """A feature, or a video's rows of it, is missing, ambiguous or of another specification."""


class SourceError(MoclipError, ValueError):
    """The list of videos, labels or splits cannot be used."""


class VideoError(MoclipError, ValueError):
    """One video cannot be described. ``reason`` is the code that its failed entry carries."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class EncoderError(MoclipError, RuntimeError):
    """The image encoder, or its weights, cannot be loaded."""


class RunError(MoclipError, ValueError):
    """A training, an evaluation or a run directory cannot be used as asked."""


class TooManyFailuresError(MoclipError, RuntimeError):
    """An extraction ended with more failed videos than were allowed."""
