"""Where the files of a base model are, which lie elsewhere than the data."""

from pathlib import Path

from lorry.wire.errors import UnsupportedModelError

_ONLY_SETTINGS = ["*.json", "*.txt", "*.model", "*.py"]


def base_folder(base: str | None, served: str, *, weights: bool = True) -> Path:
    """Of `base`, a folder or a hub id; of None, the hub id that the model is `served` under: that is sought at the hub
    alone, whatever lies here. Without `weights` none are downloaded.

    Raises UnsupportedModelError where there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if base is not None and Path(base).is_dir():
        return Path(base)
    name = base or served
    ignored, allowed = ["*.bin", "*.pth", "*.gguf", "original/*"], None if weights else _ONLY_SETTINGS
    try:
        return Path(snapshot_download(name, ignore_patterns=ignored, allow_patterns=allowed))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(
            f"no base model {name!r} as a folder or at the hub: {reason}. --base says where it is"
        ) from error
