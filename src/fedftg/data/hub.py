"""Downloads from the HuggingFace hub with the datasets library, which keeps them in its own cache as arrow files."""

from __future__ import annotations

from pathlib import Path

from fedftg.data.decode import one_line
from fedftg.errors import InputError


def download(
    hub_id: str, subset: str | None = None, revision: str | None = None, *, folder: str | None = None
) -> dict[str, list[Path]]:
    """The arrow files of each split of a data set; what was downloaded before is not downloaded again.

    Args:
        hub_id: owner/name on the hub.
        subset: configuration; None where the data set has one only.
        revision: branch, tag or commit; None takes the newest.
        folder: the only folder of the repository that is needed, for the advice how to fetch it by hand.

    Raises:
        InputError: the library is missing, there is no such data set, or it cannot be reached; says how to go on.
    """
    try:
        import datasets  # two seconds of import time, and no dependency of the package
    except ImportError as error:
        raise InputError(
            f"downloading {hub_id} needs the datasets library, which is not installed; pip install 'fedftg[data]', or "
            f"set data.root to a folder with its parquet files"
        ) from error
    try:
        loaded = datasets.load_dataset(hub_id, subset, revision=revision)
    # Whatever the network, the library or the files do wrong; there is no common class.
    except Exception as error:
        raise _told(hub_id, revision, folder, error) from error
    return {str(name): [Path(part["filename"]) for part in split.cache_files] for name, split in loaded.items()}


def _told(hub_id: str, revision: str | None, folder: str | None, error: Exception) -> InputError:
    if isinstance(error, ValueError) and "config" in str(error).lower():
        # The library's message goes on with the configurations there are, and then with an example in Python.
        text = " ".join(str(error).partition("Example of usage")[0].split())
        return InputError(f"{hub_id}: {text}; set data.subset to one of them")
    text = one_line(error)
    if type(error).__name__ == "DatasetNotFoundError":
        return InputError(f"{hub_id} cannot be loaded ({text}); correct data.hub_id, or log in with 'hf auth login'")
    only = f' --include "{folder}/*"' if folder else ""
    only += f" --revision {revision}" if revision else ""
    return InputError(
        f"{hub_id} is not here and cannot be downloaded ({text}); try again, or where there is network run "
        f"'hf download {hub_id} --repo-type dataset --local-dir DIR{only}', and set data.root to DIR"
    )
