"""Checks a card's front matter, the model's metadata on the Hub, without a network. No torch.

The rules are the Hub's: https://huggingface.co/docs/hub/model-cards, /repositories-licenses, and `modelcard.md` of
huggingface/hub-docs. huggingface_hub checks a card only by a request to the Hub; this module needs no network, so it
can check a card before it is written.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from dpokit.errors import SettingsError

# The Hub's identifiers except `unknown` (hub-docs, repositories-licenses, 2026).
LICENCES = frozenset(
    re.findall(
        r"\S+",
        """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
    unlicense wtfpl zlib
    """,
    )
)
# ISO 639-1. The 7,900 codes of three letters are only checked for their form.
LANGUAGES = frozenset(
    re.findall(
        r"\S+",
        """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
    es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
    ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
    no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta
    te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """,
    )
)
NO_LANGUAGE = ("code", "multilingual")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
LISTS = ("datasets", "language", "metrics", "tags")
TEXTS = ("base_model_relation", "library_name", "license", "license_link", "license_name", "pipeline_tag")
LICENCE_FILE = r"LICENSE(\.md)?"  # beside the card
DATA_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
LOCAL = re.compile(r"[/~]|\.{1,2}(/|$)|[A-Za-z]:\\|file:")
BLOCK = re.compile(r"---\n(.*?)\n---(\n|$)", re.DOTALL)


def is_hub_id(name: object) -> bool:
    """Whether a name is valid for a repository on the Hub, and is not the name of a file of data or weights."""
    if not isinstance(name, str) or LOCAL.match(name) or name.endswith((*DATA_FILES, ".gguf")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_on_disk(name: str) -> bool:
    """Whether a model or data name is a local path: it is no valid Hub id, or it exists on the disk."""
    return not is_hub_id(name) or Path(name).exists()


def check_hub_id(name: str, flag: str) -> None:
    """Raises SettingsError if a name is not a valid Hub id."""
    if not is_hub_id(name):
        raise SettingsError(
            f"--{flag} {name} is not a valid name on the Hub",
            expected="NAME or USER/NAME of letters, digits, '-', '_' and '.', at most 96 characters",
            do=f"--{flag} USER/NAME",
        )


def check_licence(licence: str, *, name: str | None = None, link: str | None = None) -> None:
    """Raises SettingsError if the Hub does not know the licence, or if `other` lacks its name or link."""
    do = "--license NAME; the licences of base model and data limit the choice"
    if not licence:
        raise SettingsError("no licence is set", expected="a licence that the Hub knows: apache-2.0, mit", do=do)
    if licence not in LICENCES:
        near = difflib.get_close_matches(licence.lower().replace(" ", "-"), sorted(LICENCES), n=4, cutoff=0.4)
        raise SettingsError(
            f"the Hub does not know --license {licence}",
            expected=f"one of its identifiers, such as {', '.join(near or ('apache-2.0', 'cc-by-4.0', 'mit'))}",
            do=f"{do}; for another licence: --license other --license-name NAME --license-link URL",
        )
    if licence == "other" and not (name and link):
        raise SettingsError(
            "--license other needs a name and a link",
            expected="the licence's name and the address of its text",
            do="dpokit card RUN --license other --license-name NAME --license-link URL (or LICENSE, for a file beside "
            "the card); dpokit push without --license sends that card",
        )
    if licence != "other" and (name or link):
        raise SettingsError(
            f"--license {licence} already has a name and a text", expected="a name and a link only for `other`",
            do="leave --license-name and --license-link out, or --license other",
        )  # fmt: skip
    if name and not re.fullmatch(r"[a-z0-9.-]+", name):
        raise SettingsError(
            f"--license-name {name} has characters that the Hub does not allow",
            expected="lower-case letters, digits, '-' and '.'",
            do=f"--license-name {re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-') or 'NAME'}",
        )
    if link and not re.fullmatch(rf"{LICENCE_FILE}|https?://[^\s\"'<>`\\]+", link):
        raise SettingsError(
            f"--license-link {link} is not a link", expected="an address, LICENSE or LICENSE.md", do="correct the link"
        )


def check_languages(codes: Sequence[str]) -> None:
    """Raises SettingsError for a code that is not in ISO 639."""
    for code in codes:
        if code not in LANGUAGES and code not in NO_LANGUAGE and not re.fullmatch(r"[a-z]{3}", code):
            raise SettingsError(
                f"--language {code} is not a language code",
                expected="ISO 639 in lower case: en, de, zh, gsw; or multilingual",
                do="--language CODE",
            )


def read_front_matter(text: str) -> dict[str, Any]:
    """The front matter of a card; {} if it is missing or unreadable, which the Hub reports for a hand-written card."""
    block = BLOCK.match(text)
    try:
        head = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:
        head = None
    return head if isinstance(head, dict) else {}


def check_front_matter(text: str) -> dict[str, Any]:
    """Returns the parsed front matter of a card.

    Args:
        text: the whole card.

    Raises: SettingsError: the Hub would refuse or misread it, or it holds a local path.
    """
    block = BLOCK.match(text)
    try:
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise _broken(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise _broken("the card does not start with a block of YAML between two lines of ---")
    _check_types(data)
    check_licence(data.get("license", ""), name=data.get("license_name"), link=data.get("license_link"))
    check_languages(data.get("language", []))
    bases = data.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    for key, names in (("base_model", bases), ("datasets", data.get("datasets", []))):
        for name in names:
            if not is_hub_id(name):
                raise _broken(f"{key} holds {name}, which is not a valid repository name on the Hub")
    relation = data.get("base_model_relation")
    if relation is not None and (relation not in RELATIONS or not bases):
        raise _broken(
            f"base_model_relation is {relation}; it must be one of {', '.join(RELATIONS)}, and needs a base_model"
        )
    if "model-index" in data:
        _check_results(data["model-index"])
    for value in _texts(data):
        if LOCAL.match(value):
            raise _broken(f"it holds {value}, which is a local path")
    return data


def _check_types(data: Mapping[Any, Any]) -> None:
    for key, value in data.items():
        if key in TEXTS and not (isinstance(value, str) and value):
            raise _broken(f"{key} is {value!r}, not a text")
        if key in LISTS and not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
            raise _broken(f"{key} is {value!r}, not a list of texts")  # YAML reads `no`, Norwegian, as false
    bases = data.get("base_model", "")
    if not isinstance(bases, str | list):
        raise _broken(f"base_model is {bases!r}, neither a text nor a list")


def _check_results(index: Any) -> None:
    try:
        name, results = model_index_to_eval_results(index)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _broken(f"its model-index cannot be read ({type(error).__name__}: {error})") from None
    for result in results:
        value = result.metric_value
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not sound or not all((name, result.task_type, result.dataset_type, result.dataset_name, result.metric_type)):
            raise _broken(f"its model-index has the value {value!r} of {result.metric_type!r}")


def _texts(value: Any) -> Iterator[str]:
    """Yields each string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(inner)


def _broken(why: str) -> SettingsError:
    return SettingsError(
        f"the card's front matter is not what the Hub expects: {why}",
        expected="https://huggingface.co/docs/hub/model-cards",
        do="correct it, or write the card again with dpokit card RUN --license NAME",
    )
