"""What of a run goes to the Hub: which files, under which names, and that nothing private is among them. No torch."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import file_digest, sha1, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpokit.card.front_matter import is_on_disk
from dpokit.errors import HubError
from dpokit.push.card_files import find_card_files
from dpokit.push.choose_weights import WHATS, What, check_base_model, choose
from dpokit.push.leak_scan import LeakFinder
from dpokit.rundir import RunDir, read_record

# Files of these kinds go up, and no other: weights, configurations, tokenizers.
KINDS = (
    *("model*.safetensors", "adapter_model*.safetensors", "*.safetensors.index.json", "config.json", "*_config.json"),
    *("tokenizer.json", "*vocab*.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "*.jinja", "additional_chat_templates/*.jinja", "chat_template_hh.json"),
)
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
VOCABULARIES = re.compile(r"tokenizer\.json|.*vocab.*|merges\.txt|.*\.model|.*\.png")
SHOWN_LEAKS = 8


@dataclass(frozen=True)
class ParcelFile:
    """One file that goes up.

    Attributes:
        path: in the repository.
        source: on this machine.
        content: what is sent; None for weights, which are read from `source`.
        changed: how `content` differs from `source`; "" where it does not.
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
        """As the Hub names large files."""
        if self.content is not None:
            return sha256(self.content).hexdigest()
        with self.source.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        """As git, and the Hub, name small files."""
        content = self.source.read_bytes() if self.content is None else self.content
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Parcel:
    """All that goes up, searched and found fit for it.

    Attributes:
        run: where it comes from.
        what: of the run.
        folders: that hold it.
        base_model: the Hub id that was given for the adapter's base.
        files: in the order of their paths.
        left: (file, why it stays here), of the folders that are sent.
    """

    run: RunDir
    what: What
    folders: tuple[Path, ...]
    base_model: str | None
    files: tuple[ParcelFile, ...]
    left: tuple[tuple[Path, str], ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def record(self) -> dict[str, Any]:
        """JSON values: what goes, from where, and what stays."""
        return {
            "what": self.what,
            "files": [{"path": f.path, "bytes": f.size_bytes, "from": str(f.source)} for f in self.files],
            "total_bytes": self.size_bytes,
            "left": [{"file": str(path), "why": why} for path, why in self.left],
        }

    def describe(self) -> str:
        """The same for a reader: a line a file, the total, and what stays here."""
        width = max(len(file.path) for file in self.files)
        lines = [f"{WHATS[self.what]}, of {' and '.join(map(str, self.folders))}"]
        lines += [
            f"{f.path:<{width}} {f.size_bytes:>15,} bytes  from {f.source}{f' ({f.changed})' if f.changed else ''}"
            for f in self.files
        ]
        lines += [f"{f'{len(self.files)} files':<{width}} {self.size_bytes:>15,} bytes"]
        return "\n".join(lines + [f"stays here: {path} ({why})" for path, why in self.left])


def build_parcel(
    run: RunDir, *, what: str | None = None, base_model: str | None = None, repo_id: str | None = None
) -> Parcel:
    """What `dpokit push` sends: the model at the repository's root, an adapter there or, beside a model, in adapter/.

    Nothing is written, and no local file is changed: what names a local folder is left out of what is sent.

    Args:
        run: its folder, with a card.
        what: as for `choose`.
        base_model: the adapter's base on the Hub, where it was trained on a local folder.
        repo_id: where it goes; None where a card may tell of any repository.

    Raises:
        SettingsError: something that this run does not have.
        HubError: a file that is missing, or that holds what must not be sent.
        RunFolderError: a link that leads out of the run folder.
    """
    run.check_links()
    chosen, whole = choose(run, what), run.find_whole()
    check_base_model(chosen, base_model)
    folders = [] if chosen == "adapter" or whole is None else [(whole, "")]
    folders += [] if chosen == "merged" else [(run.adapter, "adapter/" if chosen == "both" else "")]
    beside = find_card_files(run, is_adapter=chosen == "adapter", repo_id=repo_id)
    files, left = [], []
    for name, source in beside:
        run.check_inside(source)
        files.append(ParcelFile(name, source, source.read_bytes()))
    for folder, at in folders:
        kinds = (*KINDS, "*.py") if _list_code(folder) else KINDS
        kept = sorted({path for kind in kinds for path in folder.glob(kind) if path.is_file()})
        _check_weights(folder, {path.name for path in kept})
        files += [_read_file(path, at + path.relative_to(folder).as_posix(), base_model) for path in kept]
        if folder == run.merged and run.merge_json.is_file():
            kept.append(run.merge_json)
            files.append(_read_file(run.merge_json, run.merge_json.name, base_model))
        others = sorted(path for path in folder.rglob("*") if path.is_file() and path not in kept)
        left += [(path, _why_not(path)) for path in others]
    named = tuple(folder for folder, _ in folders)
    parcel = Parcel(run, chosen, named, base_model, tuple(sorted(files, key=lambda file: file.path)), tuple(left))
    _check_private(parcel)
    return parcel


def _check_weights(folder: Path, names: set[str]) -> None:
    """Raises HubError for a folder from which no model could be loaded."""
    missing = [] if {"config.json", "adapter_config.json"} & names else ["config.json"]
    missing += [] if any(name.endswith(".safetensors") for name in names) else ["*.safetensors"]
    for name in sorted(names):
        if name.endswith(".safetensors.index.json"):
            missing += sorted(set(_read_json(folder / name).get("weight_map", {}).values()) - names)
    missing += sorted(_list_code(folder) - names)
    if missing:
        raise HubError(
            f"{folder} has no {', '.join(missing)}",
            expected="a model or an adapter as safetensors, whole",
            do="train or merge it anew: this folder could not be loaded by anyone",
        )


def _list_code(folder: Path) -> set[str]:
    """The Python files that a model of `trust_remote_code` names as its own, not as another repository's."""
    config = folder / "config.json"
    named = _read_json(config).get("auto_map", {}).values() if config.is_file() else ()
    return {f"{name.partition('.')[0]}.py" for name in named if isinstance(name, str) and "--" not in name}


def _read_file(path: Path, name: str, base_model: str | None) -> ParcelFile:
    if path.suffix == ".safetensors":
        return ParcelFile(name, path, None)
    if path.name != "config.json" and not path.name.endswith("_config.json"):
        return ParcelFile(name, path, path.read_bytes())
    config, changes = _read_json(path), []
    for key in ("_name_or_path", "name_or_path"):
        if config.get(key) and is_on_disk(str(config[key])):
            del config[key]
            changes.append(f"without {key}, a local path")
    if path.name == "adapter_config.json":
        base = str(config.get("base_model_name_or_path"))
        if base_model is None and is_on_disk(base):
            raise HubError(
                f"{path}: the adapter's base is {base}, a folder of this machine",
                expected="a base that those who load the adapter can load, too",
                do="--base-model ID, the base's id on the Hub; or --what merged",
            )
        if base_model not in (None, base):
            config["base_model_name_or_path"] = base_model
            changes.append(f"with base model {base_model}")
    content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if changes else path.read_bytes()
    return ParcelFile(name, path, content, "; ".join(changes))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = read_record(path)
    except (ValueError, RecursionError) as error:
        record = error
    if not isinstance(record, dict):
        raise HubError(f"{path} is damaged", expected="a JSON mapping", do="write the weights' folder anew")
    return record


def _why_not(path: Path) -> str:
    if path.suffix in PICKLES:
        return "a pickle: it can run code when it is loaded"
    return "not weights, a configuration or a tokenizer"


def _check_private(parcel: Parcel) -> None:
    """Raises HubError that names file and line of each token and local path."""
    finder = LeakFinder([parcel.run.path])
    found = [f"{file.source}{where} holds {what}" for file in parcel.files for where, what in _find_leaks(file, finder)]
    if found:
        more = f"; and {len(found) - SHOWN_LEAKS} more" if len(found) > SHOWN_LEAKS else ""
        raise HubError(
            "; ".join(found[:SHOWN_LEAKS]) + more,
            expected="files without tokens, local paths and user names",
            do="remove it there (a token that was written to a file should be revoked); nothing was sent",
        )


def _find_leaks(file: ParcelFile, finder: LeakFinder) -> Iterator[tuple[str, str]]:
    """(", line N" or "", what) for each."""
    name = file.source.name
    if file.content is None:
        try:
            with safe_open(file.source, framework="numpy") as weights:
                about = json.dumps(weights.metadata() or {}, ensure_ascii=False)
        except SafetensorError as error:
            raise HubError(
                f"{file.source} cannot be read ({error})", expected="whole weights", do="train or merge it anew"
            ) from error
        yield from (("'s header", what) for _, what in finder.in_text(about))
    elif VOCABULARIES.fullmatch(name):
        yield from (("", what) for what in finder.in_bytes(file.content))
    else:
        search = finder.in_json if name.endswith(".json") else finder.in_text
        yield from ((f", line {line}", what) for line, what in search(file.content.decode(errors="replace")))
