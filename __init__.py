"""moclip: decode each compressed video once into a feature store, and train from the store ever after."""

from typing import TYPE_CHECKING, Any

from moclip.errors import MoclipError

if TYPE_CHECKING:
    from moclip.store import Store, open_store

__version__ = "0.1.0"
__all__ = ["MoclipError", "Store", "__version__", "open_store"]


def __getattr__(name: str) -> Any:
    """Import the store only when it is asked for, so that ``import moclip`` stays cheap."""
    if name in ("Store", "open_store"):
        from moclip import store

        return getattr(store, name)
    raise AttributeError(f"module 'moclip' has no attribute {name!r}")
