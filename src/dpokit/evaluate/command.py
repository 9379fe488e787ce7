"""From names to the records: what `dpokit evaluate` does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpokit.apikey import check_url, read_api_key
from dpokit.console import quiet_dependencies, say
from dpokit.distributed.coordination import decide_on_main_process, peer_errors
from dpokit.errors import SettingsError, find_disk_trouble
from dpokit.evaluate.answers import Sampling, build_prompts, find_room, write_answers
from dpokit.evaluate.inputs import Subject, load_subject
from dpokit.evaluate.judge import REPLY_TOKENS, judge_answers
from dpokit.evaluate.pairs import evaluate_pairs
from dpokit.model.reference import find_cache_folder
from dpokit.rundir import lost_folder_errors, write_json


@dataclass(frozen=True)
class Judge:
    """Who compares answers.

    Attributes:
        url: of an OpenAI-compatible endpoint, to which `/chat/completions` is added.
        model: which model there.
        key_variable: the environment variable with its key.
        limit: of the answers that are judged, at two requests each.
        max_tokens: most tokens of a reply.

    Raises: SettingsError for a URL, a key or a name that nobody can be asked with.
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
            raise SettingsError("a judge's URL was named, and no model there", expected="both", do="--judge-model NAME")


def evaluate_model(
    what: str,
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
    """What eval/pairs.json holds, and under `answers` and `judge` what was sampled and judged. Collective.

    A run's folder keeps it. Of a model that was named, answers are counted and judged, and not kept.

    Args:
        what, base, data, split, argv: as for `load_subject`.
        limit: of the pairs, the first so many.
        answers: prompts that both models answer; 0 for none.
        sampling: how they answer.
        judge: who compares the answers.

    Raises: DpokitError: what the user can mend.
    """
    quiet_dependencies()
    if judge is not None and not answers:
        raise SettingsError(
            "a judge was named, and no answers are sampled", expected="answers to judge", do="--answers 50"
        )
    sampling = sampling or Sampling()
    with lost_folder_errors(what):
        subject = load_subject(what, base=base, data=data, split=split, argv=argv)
        if answers:
            # What cannot be answered is an error before anything is scored.
            find_room(subject.base, subject.tuned, sampling)
        with peer_errors(subject.settings.training.ddp_timeout):
            record = evaluate_pairs(subject, limit=limit)
            if subject.run is not None:
                path, record["end"] = subject.run.pairs_json, subject.run.find_end()
                decide_on_main_process(lambda: _write(path, record))
                say(str(path))
            if answers:
                with TemporaryDirectory(prefix="dpokit-answers-") as unkept:
                    folder = Path(unkept) if subject.run is None else subject.run.eval
                    record |= _answer(subject, folder, answers, sampling, judge)
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
    found: dict[str, Any] = {"answers": outcome}
    if judge is not None:
        found["judge"] = decide_on_main_process(lambda: _judge(folder, judge))
    return found


def _judge(folder: Path, judge: Judge) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    found = judge_answers(
        records,
        url=judge.url,
        model=judge.model,
        api_key=read_api_key(judge.key_variable),
        cache=find_cache_folder().parent / "judge",
        limit=judge.limit,
        max_reply_tokens=judge.max_tokens,
    )
    found = {"model": judge.model, "url": judge.url, **found}
    _write(folder / "judge.json", found)
    return found


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        if not path.parent.exists():
            path.parent.mkdir()
        write_json(path, record)
    except OSError as error:
        raise find_disk_trouble(error) or error from error
