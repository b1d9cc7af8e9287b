"""Weights of image backbones: read from a file, hashed, or fetched by a library that knows where they are."""

import hashlib
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moclip.errors import EncoderError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_HUB_TIMEOUT_S = 3.0


def read_weights(file: str | Path) -> dict[str, "torch.Tensor"]:
    """The tensors of a safetensors file or of a plain ``torch.save``, out of the usual wrappers.

    Nothing in the file is executed. :class:`EncoderError` if it holds anything but named tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(file).suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EncoderError(f"no weights file {file}") from None
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"the weights file {file} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises whatever its parsers raise
        reason = str(error).splitlines()[0]
        raise EncoderError(
            f"the weights file {file} is neither safetensors nor a plain state dict of tensors ({reason}); "
            "save it with safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    tensors = isinstance(found, dict) and all(isinstance(value, torch.Tensor) for value in found.values())
    if not tensors or not found:
        raise EncoderError(f"the weights file {file} holds no state dict of tensors")
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return dict(found)


def hash_weights(state: Mapping[str, "torch.Tensor"]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in order of names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_strictly(model: Any, state: Mapping[str, "torch.Tensor"], file: str) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise EncoderError(f"the weights file {file} is of another model: {' '.join(lines)[:300]}") from error


@contextmanager
def reaching_weights(name: str) -> Iterator[None]:
    """Let a library fetch weights, from its cache alone where the hub does not answer, and say so if it
    fails.

    The hub's client retries for most of a minute before it gives up; one short question is enough to know.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _answers(constants.ENDPOINT)
    try:
        yield
    except EncoderError:
        raise
    except Exception as error:
        log.debug("loading %s failed", name, exc_info=error)
        if not constants.HF_HUB_OFFLINE:
            raise EncoderError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
        raise EncoderError(
            f"the weights of {name} are not cached and {constants.ENDPOINT} is out of reach: give them with "
            "--weights FILE, run once where it is reachable, or use --encoder none"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """open_clip logs on the root logger, which would install a handler there for good."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addHandler(handler)
    root.addFilter(errors_only)
    try:
        yield
    finally:
        root.removeFilter(errors_only)
        root.removeHandler(handler)
