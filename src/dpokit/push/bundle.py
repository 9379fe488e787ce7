"""The files of a run that are sent to the Hub, their names there, and a check for private content. No torch."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import file_digest, sha1, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpokit.atomic_files import read_record
from dpokit.card.front_matter import is_on_disk
from dpokit.card.origin import Weights
from dpokit.errors import HubError
from dpokit.push.card_files import find_card_files
from dpokit.push.choose_weights import WEIGHTS, check_base_model, choose_weights
from dpokit.push.leak_scan import LeakFinder
from dpokit.rundir import RunDir

# Only files of these kinds are sent: weights, configurations, tokenizers.
KINDS = (
    *("model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json", "config.json", "*_config.json"),
    *("tokenizer.json", "*vocab*.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json", "chat_template_hh.json"),
)
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
VOCABULARIES = re.compile(r"tokenizer\.json|.*vocab.*|merges\.txt|.*\.model|.*\.png")
SHOWN_LEAKS = 8


@dataclass(frozen=True)
class BundleFile:
    """One file to send.

    Attributes:
        path: in the repository.
        source: the file on this machine.
        content: the bytes to send; None for weights, which are read from `source`.
        changed: how `content` differs from `source`; "" where they are equal.
    """

    path: str
    source: Path
    content: bytes | None = field(repr=False)
    changed: str = ""

    @property
    def size_bytes(self) -> int:
        return self.source.stat().st_size if self.content is None else len(self.content)

    @cached_property
    def sha256(self) -> str:
        """The sha256 by which the Hub identifies a large file."""
        if self.content is not None:
            return sha256(self.content).hexdigest()
        with self.source.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        """The id of git's blob, by which the Hub identifies a small file."""
        content = self.source.read_bytes() if self.content is None else self.content
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """All files to send, checked for secrets and local paths.

    Attributes:
        run: the source run.
        weights: whether the whole model, the adapter or both are sent.
        folders: the folders that hold these weights.
        base_model: the Hub id of the adapter's base, if the caller set one.
        files: sorted by path.
        left: (file, reason) for each file of `folders` that is not sent.
    """

    run: RunDir
    weights: Weights
    folders: tuple[Path, ...]
    base_model: str | None
    files: tuple[BundleFile, ...]
    left: tuple[tuple[Path, str], ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def record(self) -> dict[str, Any]:
        """JSON values: the files to send, their sources, and the files that are not sent."""
        return {
            "weights": self.weights,
            "files": [{"path": f.path, "bytes": f.size_bytes, "from": str(f.source)} for f in self.files],
            "total_bytes": self.size_bytes,
            "left": [{"file": str(path), "why": why} for path, why in self.left],
        }

    def describe(self) -> str:
        """The record as text: one line for each file, the total, and the files that are not sent."""
        width = max(len(file.path) for file in self.files)
        lines = [f"{WEIGHTS[self.weights]}, of {' and '.join(map(str, self.folders))}"]
        lines += [
            f"{f.path:<{width}} {f.size_bytes:>15,} bytes  from {f.source}{f' ({f.changed})' if f.changed else ''}"
            for f in self.files
        ]
        lines += [f"{f'{len(self.files)} files':<{width}} {self.size_bytes:>15,} bytes"]
        return "\n".join(lines + [f"not sent: {path} ({why})" for path, why in self.left])


def build_bundle(
    run: RunDir, *, weights: str | None = None, base_model: str | None = None, repo_id: str | None = None
) -> Bundle:
    """Returns the files that `dpokit push` sends. Reads only: local paths are removed from the sent copy of a config.

    The model is at the repository's root; the adapter is there too, or in adapter/ if both are sent.

    Args:
        run: a run folder with a card.
        weights: as for `choose_weights`.
        base_model: the adapter's base on the Hub, for an adapter that was trained on a local folder.
        repo_id: the target repository; None skips the check that the card names it.

    Raises:
        SettingsError: the run does not have these weights.
        HubError: a file is missing, or holds a secret or a local path.
        RunFolderError: a link leads out of the run folder.
    """
    run.check_links()
    chosen, whole = choose_weights(run, weights), run.find_whole()
    check_base_model(chosen, base_model)
    folders = [] if chosen == "adapter" or whole is None else [(whole, "")]
    folders += [] if chosen == "model" else [(run.adapter, "adapter/" if chosen == "both" else "")]
    card_files = find_card_files(run, is_adapter=chosen == "adapter", repo_id=repo_id)
    files, left = [], []
    for name, source in card_files:
        run.check_inside(source)
        files.append(BundleFile(name, source, source.read_bytes()))
    for folder, prefix in folders:
        kinds = (*KINDS, "*.py") if _list_code(folder) else KINDS
        kept = sorted({path for kind in kinds for path in folder.glob(kind) if path.is_file()})
        _check_weights(folder, {path.name for path in kept})
        files += [_read_file(path, prefix + path.relative_to(folder).as_posix(), base_model) for path in kept]
        if folder == run.merged and run.merge_json.is_file():
            kept.append(run.merge_json)
            files.append(_read_file(run.merge_json, run.merge_json.name, base_model))
        others = sorted(path for path in folder.rglob("*") if path.is_file() and path not in kept)
        left += [(path, _explain_skip(path)) for path in others]
    named = tuple(folder for folder, _ in folders)
    bundle = Bundle(run, chosen, named, base_model, tuple(sorted(files, key=lambda file: file.path)), tuple(left))
    _check_private(bundle)
    return bundle


def _check_weights(folder: Path, names: set[str]) -> None:
    """Raises HubError for a folder from which no model can be loaded."""
    missing = [] if {"config.json", "adapter_config.json"} & names else ["config.json"]
    missing += [] if any(name.endswith(".safetensors") for name in names) else ["*.safetensors"]
    for name in sorted(names):
        if name.endswith(".safetensors.index.json"):
            missing += sorted(set(_read_json(folder / name).get("weight_map", {}).values()) - names)
    missing += sorted(_list_code(folder) - names)
    if missing:
        raise HubError(
            f"{folder} has no {', '.join(missing)}",
            expected="a complete model or adapter as safetensors",
            do="train or merge it again: nobody can load this folder",
        )


def _list_code(folder: Path) -> set[str]:
    """The Python files that a model with custom code names in `auto_map`, without those of other repositories."""
    config = folder / "config.json"
    named = _read_json(config).get("auto_map", {}).values() if config.is_file() else ()
    return {f"{name.partition('.')[0]}.py" for name in named if isinstance(name, str) and "--" not in name}


def _read_file(path: Path, name: str, base_model: str | None) -> BundleFile:
    if path.suffix == ".safetensors":
        return BundleFile(name, path, None)
    if path.name != "config.json" and not path.name.endswith("_config.json"):
        return BundleFile(name, path, path.read_bytes())
    config, changes = _read_json(path), []
    for key in ("_name_or_path", "name_or_path"):
        if config.get(key) and is_on_disk(str(config[key])):
            del config[key]
            changes.append(f"without {key}, a local path")
    if path.name == "adapter_config.json":
        base = str(config.get("base_model_name_or_path"))
        if base_model is None and is_on_disk(base):
            raise HubError(
                f"{path}: the adapter's base is {base}, a folder or file of this machine",
                expected="a base that others can load, too",
                do="--base-model ID, the base's id on the Hub; or --weights model",
            )
        if base_model not in (None, base):
            config["base_model_name_or_path"] = base_model
            changes.append(f"with base model {base_model}")
    content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if changes else path.read_bytes()
    return BundleFile(name, path, content, "; ".join(changes))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = read_record(path)
    except (ValueError, RecursionError) as error:
        record = error
    if not isinstance(record, dict):
        raise HubError(f"{path} is damaged", expected="a JSON mapping", do="train or merge it again")
    return record


def _explain_skip(path: Path) -> str:
    if path.suffix in PICKLES:
        return "a pickle: it can run code when it is loaded"
    return "not weights, a configuration or a tokenizer"


def _check_private(bundle: Bundle) -> None:
    """Raises HubError with file and line of each secret and local path."""
    finder = LeakFinder([bundle.run.path])
    leaks = [f"{file.source}{place} holds {leak}" for file in bundle.files for place, leak in _find_leaks(file, finder)]
    if leaks:
        more = f"; and {len(leaks) - SHOWN_LEAKS} more" if len(leaks) > SHOWN_LEAKS else ""
        raise HubError(
            "; ".join(leaks[:SHOWN_LEAKS]) + more,
            expected="files without tokens, local paths and user names",
            do="remove it from the file, and revoke a token that was in one; nothing was sent",
        )


def _find_leaks(file: BundleFile, finder: LeakFinder) -> Iterator[tuple[str, str]]:
    """(place in the file, description) of each leak; the place is ", line N", "'s header" or ""."""
    name = file.source.name
    if file.content is None:
        try:
            with safe_open(file.source, framework="numpy") as weights:
                header = json.dumps(weights.metadata() or {}, ensure_ascii=False)
        except SafetensorError as error:
            raise HubError(
                f"{file.source} cannot be read ({error})",
                expected="a complete weights file",
                do="train or merge it again",
            ) from error
        yield from (("'s header", leak) for _, leak in finder.search_text(header))
    elif VOCABULARIES.fullmatch(name):
        yield from (("", leak) for leak in finder.search_bytes(file.content))
    else:
        search = finder.search_json if name.endswith(".json") else finder.search_text
        yield from ((f", line {line}", leak) for line, leak in search(file.content.decode(errors="replace")))
