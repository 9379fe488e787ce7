"""Loads a dataset of the Hub: rows of text alone, from files of its own repository."""

from pathlib import Path

from datasets import DatasetBuilder, DownloadConfig, DownloadManager, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError

from dpokit.data.check_file import check_file
from dpokit.data.files import BUILDERS, find_builder
from dpokit.data.paths import find_hub_name
from dpokit.data.text_columns import ColumnChoice, Rows, leave_out
from dpokit.errors import DataError, find_disk_trouble_or
from dpokit.reachable_hub import use_cache_without_hub

# Builders of `datasets` that a Hub dataset may use; `cache` reads what another wrote earlier, without a network.
HUB_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "cache")


def load_from_hub(name: str, config_name: str | None, *, streaming: bool, choice: ColumnChoice) -> dict[str, Rows]:
    """Loads every split of a dataset, by its Hub id or address.

    Raises: DataError: it cannot be reached, is not text, or names files outside of its repository.
    """
    identifier, revision = find_hub_name(name)
    use_cache_without_hub(identifier)
    try:
        builder = load_dataset_builder(identifier, config_name, revision=revision)
        check_hub_builder(name, builder)
        if streaming:
            return leave_out(name, dict(builder.as_streaming_dataset()), choice)
        check_downloads(builder)
        builder.download_and_prepare()
        return leave_out(name, dict(builder.as_dataset()), choice)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        raise find_disk_trouble_or(
            error,
            f"{name} could not be loaded from the Hub: {' '.join(str(error).split())[:300]}",
            "a dataset that this machine can reach, with this configuration",
            "check the name and --dataset_config; for a gated dataset log in with `hf auth login`; without a network "
            "name a file or a folder",
        ) from error


def _find_kind(builder: DatasetBuilder) -> str:
    """Returns the module of `datasets` that reads the files: json, csv, parquet, imagefolder, ..."""
    return type(builder).__module__.rpartition(".")[2]


def check_hub_builder(name: str, builder: DatasetBuilder) -> None:
    """Raises: DataError for a dataset that is not text, or whose README names files outside of its repository."""
    kind = _find_kind(builder)
    if kind not in HUB_BUILDERS:
        raise DataError(
            f"{name} holds {kind}",
            expected="rows of text: JSON, CSV, Parquet or Arrow files",
            do="name a dataset of preference pairs",
        )
    files = [str(file) for several in (builder.config.data_files or {}).values() for file in several]
    outside = [file for file in files if not file.startswith("hf://") or "::" in file]
    separator = getattr(builder.config, "sep", None) or ""
    if outside or len(separator) > 1:
        problem = f"names {outside[0][:200]} as its file" if outside else f"has the separator {separator[:200]!r}"
        raise DataError(
            f"{name}: its README {problem}",
            expected="files of the dataset itself, and a separator of one letter",
            do="download the files, and name one of them",
        )


def check_downloads(builder: DatasetBuilder) -> None:
    """Downloads a dataset's files into the cache, where its builder finds them. Raises: DataError as `check_file`."""
    kind = _find_kind(builder)
    downloads = DownloadManager(download_config=DownloadConfig(token=builder.token))
    for several in (builder.config.data_files or {}).values() if kind in set(BUILDERS.values()) else ():
        for file in map(Path, downloads.download(list(several))):
            # A file that is packed in another way than gzip is checked by `datasets`, which unpacks it.
            if find_builder(file) == kind and file.suffix != ".zst":
                # A README may name another separator than a comma.
                check_file(file, "text" if kind == "csv" else kind, skip_bad=None)
