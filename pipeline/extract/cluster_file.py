"""The file behind ``--cluster``: which Dask cluster class, with which arguments, and how many workers."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moclip.errors import SourceError

_TYPES: Mapping[str, type] = {"class": str, "arguments": dict, "workers": int, "adaptive": dict, "threads": int}


@dataclass(frozen=True)
class ClusterFile:
    """A Dask cluster to start: the dotted path of its class, or of a function that returns one, and its arguments.

    ``workers`` is how many it is kept at; ``adaptive`` the arguments of its ``adapt`` instead. With neither it
    stays as it starts. ``threads`` is how many threads each worker process may use for one task.
    """

    path: Path
    class_path: str
    arguments: Mapping[str, Any]
    workers: int | None = None
    adaptive: Mapping[str, Any] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if not all(name.isidentifier() for name in self.class_path.split(".")) or "." not in self.class_path:
            raise self.error(f"class is {self.class_path!r}; expected a dotted path like distributed.LocalCluster")
        if self.workers is not None and self.adaptive is not None:
            raise self.error("it has both workers and adaptive; give one")
        if self.adaptive is not None and not isinstance(_most(self.adaptive), int):
            raise self.error("adaptive names no maximum, a whole number of workers (or maximum_jobs)")
        for name, count in (("workers", self.workers), ("threads", self.threads)):
            if count is not None and count < 1:
                raise self.error(f"{name} is {count}; expected 1 or more")

    @property
    def most_workers(self) -> int | None:
        """How many workers there may be, if the file says so."""
        return self.workers if self.adaptive is None else _most(self.adaptive)

    @property
    def words(self) -> str:
        """Where tasks run, for people."""
        if self.adaptive is not None:
            return f"{self.class_path}, adaptive up to {self.most_workers} workers"
        return f"{self.class_path}, {self.workers} workers" if self.workers else self.class_path

    def error(self, what: str) -> SourceError:
        return SourceError(f"{self.path}: {what}")


def read_cluster_file(path: Path) -> ClusterFile:
    """Read and check a cluster file; :class:`SourceError` names what is wrong. Nothing is imported yet."""
    try:
        found = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SourceError(f"there is no cluster file {path}") from None
    except ValueError as error:
        raise SourceError(f"{path} is no TOML file: {error}") from error
    if unknown := [name for name in found if name not in _TYPES]:
        raise SourceError(f"{path}: unknown {', '.join(map(repr, unknown))}; expected only {', '.join(_TYPES)}")
    if "class" not in found:
        raise SourceError(f'{path}: class is missing; for example class = "dask_jobqueue.SLURMCluster"')
    for name, value in found.items():
        if type(value) is not _TYPES[name]:
            raise SourceError(f"{path}: {name} is {value!r}; expected {_expected(_TYPES[name])}")
    return ClusterFile(path, found.pop("class"), found.pop("arguments", {}), **found)


def _most(adaptive: Mapping[str, Any]) -> Any:
    return adaptive.get("maximum", adaptive.get("maximum_jobs"))


def _expected(kind: type) -> str:
    return {str: "a string", int: "a whole number", dict: "a table"}[kind]
