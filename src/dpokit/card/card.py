"""Writes the model card from the run folder alone: the model, its training and its results. No torch."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dpokit.atomic_files import write_whole
from dpokit.card.citations import list_citations
from dpokit.card.escape import Mask, escape
from dpokit.card.front_matter import (
    check_front_matter,
    check_hub_id,
    check_languages,
    check_licence,
    is_hub_id,
    read_front_matter,
)
from dpokit.card.origin import Lineage, Source, Weights, build_front_matter, find_lineage, is_supervised
from dpokit.card.sections import list_limits, list_training, local_names, show_sample, show_settings
from dpokit.card.usage import build_usage
from dpokit.credentials import find_secrets
from dpokit.data.tally import describe_reason
from dpokit.errors import RunFolderError, SettingsError, find_disk_trouble
from dpokit.figures import Drawing, draw
from dpokit.report import tables
from dpokit.report.curves import build_figures, explain_figures
from dpokit.report.page import find_samples, list_alarms
from dpokit.report.read import Run, load_run, mapping, read_object
from dpokit.report.tables import Table, interval
from dpokit.report.verdict import build_verdict, find_evaluation_verdict
from dpokit.rundir import CARD_MARK, RunDir, is_card_file

FIRST_FIGURES = ("loss", "margins", "accuracies", "rewards", "logps", "grad_norm")
FIRST_ROWS = ("accuracy", "margin", "loss", "kl_per_token")
MOST_SAMPLES = 5
CONTACT, EVALUATION = "# contact: ", "# evaluation: "  # YAML comments, from which the card can be written again
MERGE = {
    "pairs": "held-out pairs scored before and after",
    "mean_drift": "mean change of a token's log-prob",
    "largest_drift": "largest change of a token's log-prob",
    "accuracy_before": "reward accuracy, adapter on its base",
    "accuracy_after": "reward accuracy, merged",
    "dtype": "precision of the merged weights",
}


@dataclass(frozen=True)
class Publisher:
    """Facts about the publication, which the run folder does not hold.

    Attributes:
        license, license_name, license_link: name and link only for `other`.
        language: ISO 639 codes of the data's languages.
        repo_id: the model's repository; None shows the folder's name instead.
        base_model: the base's id on the Hub.
        contact: where readers can ask questions.
        evaluation: the evaluation that the card shows; None for the largest of the run's own pairs.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None
    language: Sequence[str] = ()
    repo_id: str | None = None
    base_model: str | None = None
    contact: str | None = None
    evaluation: str | None = None

    def licence(self) -> dict[str, str | None]:
        return {"license": self.license, "license_name": self.license_name, "license_link": self.license_link}


def write_card(
    run: RunDir,
    *,
    license: str,
    license_name: str | None = None,
    license_link: str | None = None,
    language: Sequence[str] = (),
    repo_id: str | None = None,
    base_model: str | None = None,
    contact: str | None = None,
    weights: Weights | None = None,
    evaluation: str | None = None,
) -> Path:
    """Writes RUN/README.md and its pictures in RUN/figures/; returns the card's path.

    Args:
        license: a licence that the Hub knows; or `other`, with `license_name` and `license_link`.
        language: ISO 639 codes of the data's languages.
        repo_id: USER/NAME of the model's repository; None shows the folder's name instead.
        base_model: the base's id on the Hub, for a run that was trained on a local folder.
        contact: where readers can ask questions.
        weights: the published weights: "model", "adapter", or "both"; None for the whole model if there is one.
        evaluation: the evaluation that it shows, as for `load_run`.

    Raises:
        SettingsError: the Hub does not know the licence, or would refuse a name or a language; no such evaluation.
        RunFolderError: a folder without a run, a damaged file, a README.md that dpokit did not write or that was edited
            since, or a disk error.
    """
    run.check_links()
    for flag, text in {"license-link": license_link, "contact": contact}.items():
        for kind in find_secrets(text or ""):
            raise SettingsError(
                f"--{flag} holds {kind}", expected="text for a public card", do=f"correct --{flag}: the card shows it"
            )
    check_licence(license, name=license_name, link=license_link)
    check_languages(language)
    for flag, name in (("repo-id", repo_id), ("base-model", base_model)):
        if name is not None:
            check_hub_id(name, flag)
    publisher = Publisher(
        license, license_name, license_link, tuple(language), repo_id, base_model, contact, evaluation
    )
    record = load_run(run.path, name=run.path.resolve().name, evaluation=evaluation)
    lineage = find_lineage(run, record, weights=weights, base_model=base_model)
    drawings = [draw(figure, software=CARD_MARK) for figure in build_figures([record])]
    record = replace(record, path=Path("RUN"))  # the verdict may name the path
    title = repo_id.rpartition("/")[2] if repo_id else record.name
    head = build_front_matter(record, lineage, model_name=title, language=language, licence=publisher.licence())
    body = render_card(build_card(run, record, lineage, publisher, drawings, title=title), record)
    for mark, text in ((EVALUATION, evaluation), (CONTACT, contact)):
        if text is not None:  # a contact's text in the body is escaped
            head = f"{mark}{json.dumps(text)}\n{head}"
    text = sign_card(f"---\n{head}\n---\n\n{body}")
    check_front_matter(text)
    _write(run, text, drawings)
    return run.card


def read_publisher(run: RunDir) -> Publisher:
    """The facts of the publication in the run's card, which `write_card` wrote; without a card, none.

    Raises: RunFolderError as `check_card_overwrite`.
    """
    check_card_overwrite(run.card)
    text = run.card.read_bytes().decode(errors="replace") if run.card.exists() else ""
    head = read_front_matter(text)
    language = head.get("language") or ()
    comments = text.partition("\n---\n")[0]
    contact, evaluation = (re.search(rf"^{mark}(.*)$", comments, re.MULTILINE) for mark in (CONTACT, EVALUATION))
    return Publisher(
        str(head.get("license") or ""),
        head.get("license_name"),
        head.get("license_link"),
        (language,) if isinstance(language, str) else tuple(map(str, language)),
        base_model=head.get("base_model"),
        contact=json.loads(contact[1]) if contact else None,
        evaluation=json.loads(evaluation[1]) if evaluation else None,
    )


def build_card(
    folder: RunDir, run: Run, lineage: Lineage, publisher: Publisher, drawings: Sequence[Drawing], *, title: str
) -> dict[str, Any]:
    """The template's values: plain text, or Markup for generated Markdown and HTML."""
    samples, sample_count = find_samples(run)
    below = [tables.list_answers(run), tables.list_evaluations(run)]
    is_evaluated = find_evaluation_verdict(run) is not None
    settings = [show_settings(run, table) for table in tables.list_settings(run)]
    usage, usage_note = build_usage(folder, run, lineage, publisher.repo_id)
    return {
        "title": title,
        "intro": _introduce(run, lineage),
        "verdict": build_verdict(run),
        "alarms": [text.removeprefix("alarm ") for text in list_alarms(run)],
        "notes": run.notes,
        "usage": usage,
        "usage_note": usage_note,
        "origin": _list_origin(run, lineage),
        "data": _list_data(run),
        "supervised": is_supervised(run),
        "pairs": _order_pairs(tables.list_pairs(run)),
        "more": [replace(table, folded=True) for table in below if table is not None],
        "merge": None if lineage.is_adapter or folder.find_whole() != folder.merged else _find_merge(folder),
        "samples": [show_sample(sample) for sample in samples[:MOST_SAMPLES]],
        "sample_count": sample_count,
        "figures": [drawing for drawing in drawings if drawing.figure.key in FIRST_FIGURES],
        "more_figures": [drawing for drawing in drawings if drawing.figure.key not in FIRST_FIGURES],
        "explanation": explain_figures([run]),
        "facts": list_training(run),
        "settings": settings,
        "limits": list_limits(run, lineage, language=publisher.language, is_evaluated=is_evaluated),
        "licence": _show_licence(publisher),
        "contact": publisher.contact,
        "citations": [Markup(entry) for entry in _list_citations(run, lineage)],
    }


def render_card(card: dict[str, Any], run: Run) -> str:
    """The card's text. Every value except Markup is escaped, and its local paths are shortened."""
    names = [run.setting(name) for name in ("model_name_or_path", "output_dir", "deepspeed")] + run.data_names()
    names += [place for source in run.data_sources() for place in source.locations]
    names.append(str(mapping((run.pairs or {}).get("data")).get("name")).rpartition(", split ")[0])
    local = local_names(run)
    mask = Mask(name for name in names if isinstance(name, str) and (name in local or not is_hub_id(name)))

    def show(value: object) -> Markup:
        return value if isinstance(value, Markup) else escape(mask(str(value)))

    environment = Environment(
        autoescape=True, finalize=show, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string((files("dpokit.card") / "card.md").read_text()).render(card)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def sign_card(text: str) -> str:
    """Adds a YAML comment with a hash to the card, by which dpokit recognises its card and later edits of it."""
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
    return text.replace("---\n", f"---\n# {CARD_MARK}, {digest}: once edited, it is not overwritten\n", 1)


def check_card_overwrite(path: Path) -> None:
    """Raises RunFolderError if the path exists and `dpokit card` did not write it, or a user edited it since."""
    if not path.exists():
        return
    if not path.is_file() or not is_card_file(path):
        raise RunFolderError(
            f"{path} exists, and was not written by dpokit card",
            expected="a free name, or an older card to replace",
            do=f"move it away (mv {path.name} {path.stem}.mine{path.suffix})",
        )
    text = path.read_bytes().decode(errors="replace") if path.suffix == ".md" else ""
    if text and sign_card(re.sub(rf"^# {CARD_MARK}, .*\n", "", text, count=1, flags=re.MULTILINE)) != text:
        raise RunFolderError(
            f"{path} was edited since dpokit card wrote it",
            expected="an unedited card: an edited one is not overwritten",
            do=f"keep it, or move it away first (mv {path.name} {path.stem}.mine{path.suffix})",
        )


def _write(run: RunDir, text: str, drawings: Sequence[Drawing]) -> None:
    pictures = {run.figures / f"{drawing.figure.key}.png": drawing.png for drawing in drawings}
    try:
        for path in (run.card, *pictures):
            check_card_overwrite(path)
        for old in run.own_card():
            if old != run.card and old not in pictures:
                old.unlink()
        if pictures:
            run.figures.mkdir(exist_ok=True)
        for path, png in pictures.items():
            write_whole(path, png)
        write_whole(run.card, text.encode(errors="replace"))
    except OSError as error:
        trouble = find_disk_trouble(error)
        if trouble is None:
            raise
        raise RunFolderError(
            trouble.seen,
            expected="a run folder with space for a card and its pictures, and permission to write",
            do="free some space and correct the permissions, or copy the folder elsewhere",
        ) from None


# -- parts -------------------------------------------------------------------------------------------------------------


def _introduce(run: Run, lineage: Lineage) -> Markup:
    train = mapping((run.data or {}).get("train"))
    kept = train.get("kept")
    pairs = Markup(f"{kept:,} preference pairs" if isinstance(kept, int) else "preference pairs")
    if lineage.datasets:
        links = [_link(source, "datasets/") for source in lineage.datasets]
        pairs += Markup(" of ") + Markup(", ").join(links)
    kind = "A LoRA adapter for" if lineage.is_adapter else "A version of"
    base = "an unknown model" if lineage.base is None else _link(lineage.base)
    how = " (through a LoRA adapter, merged)" if run.setting("use_peft") and not lineage.is_adapter else ""
    tuned = "tuned with Direct Preference Optimization (DPO)"
    if is_supervised(run):
        tuned, pairs = "fine-tuned (SFT)", Markup("the chosen answers of ") + pairs
    return Markup("{} {}, {}{} on {}.").format(kind, base, tuned, how, pairs)


def _link(source: Source, kind: str = "") -> Markup:
    """A name on the Hub as a link; a local name as plain text."""
    if source.on_hub:
        return Markup("[{0}](https://huggingface.co/{1}{0})").format(escape(source.name), kind)
    return Markup("{} (local, not on the Hub)").format(escape(source.name))


def _list_origin(run: Run, lineage: Lineage) -> list[tuple[str, object]]:
    relation = "adapter" if lineage.is_adapter else "finetune"
    rows: list[tuple[str, object]] = [("relation to the base", relation)]
    if lineage.base is not None:
        rows.insert(0, ("base model", _link(lineage.base)))
    if lineage.continued is not None:
        rows.append(("adapter that was trained further", _link(lineage.continued)))
    rows += [("trained on", _link(source, "datasets/")) for source in lineage.datasets]
    rows += [("measured on", _link(source, "datasets/")) for source in lineage.measured_on]
    fingerprint = (run.data or {}).get("fingerprint") or run.record.get("data_fingerprint")
    if fingerprint:
        rows.append(("fingerprint of the tokenised pairs", fingerprint))
    return rows


def _list_data(run: Run) -> list[Table]:
    data_tables = tables.list_data(run)
    if len(data_tables) < 2:
        return data_tables
    dropped = data_tables[1]
    rows = [[*row, describe_reason(str(row[1]))] for row in dropped.rows]
    return [data_tables[0], replace(dropped, head=[*dropped.head, "meaning"], rows=rows)]


def _order_pairs(pair_tables: Sequence[Table]) -> list[Table]:
    """Puts the rows of FIRST_ROWS first, and folds the tables of groups."""
    if not pair_tables:
        return []
    rows = sorted(
        pair_tables[0].rows, key=lambda row: FIRST_ROWS.index(row[0]) if row[0] in FIRST_ROWS else len(FIRST_ROWS)
    )
    return [replace(pair_tables[0], rows=rows), *(replace(table, folded=True) for table in pair_tables[1:])]


def _find_merge(folder: RunDir) -> Table | None:
    do = "move merged/ away, then dpokit merge RUN"
    record = read_object(folder.merge_json, do=do)
    if record is None:
        return None
    rows = [[label, interval(record[name])] for name, label in MERGE.items() if record.get(name) is not None]
    return Table("What merging changed", ["", "value"], rows) if rows else None


def _list_citations(run: Run, lineage: Lineage) -> list[str]:
    losses = run.setting("loss_type") or []
    losses = [losses] if isinstance(losses, str) else losses
    return list_citations(
        None if is_supervised(run) else losses,
        [source.name for source in lineage.datasets],
        weighted=bool(run.setting("use_weighting")),
    )


def _show_licence(publisher: Publisher) -> Markup:
    if publisher.license != "other":
        return escape(publisher.license)
    link = publisher.license_link or ""
    address = Markup('<a href="{}">{}</a>').format(link, escape(link)) if link.startswith("http") else escape(link)
    return Markup("{} ({})").format(escape(publisher.license_name), address)
