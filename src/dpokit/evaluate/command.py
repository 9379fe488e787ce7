"""The steps of `dpokit evaluate`: load models and pairs, score, sample answers, judge, write the records."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpokit.apikey import check_url, read_api_key
from dpokit.atomic_files import write_json
from dpokit.console import quiet_dependencies, say
from dpokit.distributed.coordination import decide_on_main_process, peer_errors
from dpokit.distributed.processes import is_main_process
from dpokit.errors import RunFolderError, SettingsError, find_disk_trouble
from dpokit.evaluate.answers import Sampling, build_prompts, find_prompt_limit, write_answers
from dpokit.evaluate.inputs import Subject, load_subject
from dpokit.evaluate.judge import REPLY_TOKENS, judge_answers
from dpokit.evaluate.pairs import evaluate_pairs
from dpokit.model.reference import find_cache_folder
from dpokit.report.read import choose_evaluation, read_evaluations
from dpokit.rundir import RunDir, lost_folder_errors


@dataclass(frozen=True)
class Judge:
    """The judge model that compares answers.

    Attributes:
        url: of an OpenAI-compatible endpoint; `/chat/completions` is appended.
        model: name of the judge at this endpoint.
        key_variable: the environment variable with the API key.
        limit: most pairs of answers that are judged, with two requests each.
        max_tokens: most tokens of a reply.

    Raises: SettingsError for a malformed URL or key, or an empty model name.
    """

    url: str
    model: str
    key_variable: str
    limit: int
    max_tokens: int = REPLY_TOKENS

    def __post_init__(self) -> None:
        check_url(self.url)
        read_api_key(self.key_variable)
        if not self.model:
            raise SettingsError("--judge names a URL, but no model was named", expected="both", do="--judge-model NAME")


def run_evaluation(
    run_or_model: str,
    *,
    base: str | None,
    data: str | None,
    split: str | None,
    limit: int | None,
    argv: Sequence[str],
    answers: int = 0,
    sampling: Sampling | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Returns the content of pairs.json, and those of answers.json and judge.json as `answers` and `judge`.

    Collective. A run keeps the records and answers in a new folder of eval/. For a model they are only returned.

    Args:
        run_or_model, base, data, split, argv: as for `load_subject`.
        limit: only the first `limit` pairs are scored; None for all.
        answers: number of prompts that both models answer; 0 for none.
        sampling: settings of the sampled answers.
        judge: compares the answers; None for no judge.

    Raises: DpokitError: an error that the user can correct.
    """
    quiet_dependencies()
    if judge is not None and not answers:
        raise SettingsError(
            "a judge was named, and no answers are sampled", expected="answers to judge", do="--answers 50"
        )
    sampling = sampling or Sampling()
    with lost_folder_errors(run_or_model):
        subject = load_subject(run_or_model, base=base, data=data, split=split, argv=argv)
        if answers:
            # Called for its errors: they must come before the scoring, which takes long.
            find_prompt_limit(subject.base, subject.tuned, sampling)
        with peer_errors(subject.settings.training.ddp_timeout):
            record = evaluate_pairs(subject, limit=limit)
            folder = None
            if subject.run is not None:
                run, record["end"] = subject.run, subject.run.find_end()
                folder = decide_on_main_process(lambda: _write_pairs(run, record))
            if answers:
                with TemporaryDirectory(prefix="dpokit-answers-") as temporary:
                    record |= _answer(subject, folder or Path(temporary), answers, sampling, judge)
            if subject.run is not None and folder is not None and is_main_process():
                _say_choice(subject.run, folder)
        return record


def _answer(subject: Subject, folder: Path, number: int, sampling: Sampling, judge: Judge | None) -> dict[str, Any]:
    prompts = build_prompts(subject.held_out.pairs, subject.tokenizer, limit=number)
    outcome = write_answers(
        folder,
        prompts,
        base=subject.base,
        tuned=subject.tuned,
        tokenizer=subject.tokenizer,
        sampling=sampling,
        end=None if subject.run is None else subject.run.find_end(),
    )
    records: dict[str, Any] = {"answers": outcome}
    if judge is not None:
        records["judge"] = decide_on_main_process(lambda: _judge(folder, judge))
    return records


def _judge(folder: Path, judge: Judge) -> dict[str, Any]:
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    counts = judge_answers(
        answers,
        url=judge.url,
        model=judge.model,
        api_key=read_api_key(judge.key_variable),
        cache=find_cache_folder().parent / "judge",
        limit=judge.limit,
        max_reply_tokens=judge.max_tokens,
    )
    record = {"model": judge.model, "url": judge.url, **counts}
    try:
        write_json(folder / "judge.json", record)
    except OSError as error:
        raise find_disk_trouble(error) or error from error
    return record


def _say_choice(run: RunDir, folder: Path) -> None:
    """Says which evaluation reports and cards show, if it is another one."""
    try:
        shown = choose_evaluation(read_evaluations(run, []))
    except RunFolderError:  # reports and cards show it
        return
    if shown is not None and run.path / shown.name != folder:
        say(f"reports and the card show {shown.name}; --evaluation {folder.name} shows this one")


def _write_pairs(run: RunDir, record: dict[str, Any]) -> Path:
    """Writes pairs.json to a new folder of eval/, which it returns: no evaluation replaces another."""
    try:
        files = run.make_evaluation(_name_evaluation(record))
        write_json(files.pairs_json, record)
    except OSError as error:
        raise find_disk_trouble(error) or error from error
    say(str(files.pairs_json))
    return files.folder


def _name_evaluation(record: dict[str, Any]) -> str:
    """`20261129-171026-own-20-pairs`: date, data (`own` are the run's held-out pairs), number of pairs."""
    data = record["data"]
    name = "own" if data["own"] else re.sub(r"[^\w.]+", "-", data["name"].rpartition("/")[2])[:40].strip("-.")
    date = re.sub(r"[-:]|\+.*", "", record["made"]).replace("T", "-")
    return f"{date}-{name or 'data'}-{data['pairs']}-pair{'' if data['pairs'] == 1 else 's'}"
