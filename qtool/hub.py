"""Models of the hub, fetched or from the cache."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import CheckpointError

WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights, in folders and beside them


def download(hub_id: str) -> Path:
    """The local folder of a hub model; CheckpointError says in one line why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id}: the hub gives this model only to those who accepted its terms; do so, then: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{hub_id}: no such folder here and no such model on the hub") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "unknown")
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the hub answered with status {status}; try again later"
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the hub cannot be reached (offline?); give the path of a local model"
        ) from error
