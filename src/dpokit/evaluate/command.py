"""The steps of `dpokit evaluate`: load models and pairs, score, sample answers, judge, write the records."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpokit.apikey import check_url, read_api_key
from dpokit.atomic_files import write_json
from dpokit.console import quiet_dependencies, say
from dpokit.distributed.coordination import decide_on_main_process, peer_errors
from dpokit.errors import SettingsError, find_disk_trouble
from dpokit.evaluate.answers import Sampling, build_prompts, find_prompt_limit, write_answers
from dpokit.evaluate.inputs import Subject, load_subject
from dpokit.evaluate.judge import REPLY_TOKENS, judge_answers
from dpokit.evaluate.pairs import evaluate_pairs
from dpokit.model.reference import find_cache_folder
from dpokit.rundir import lost_folder_errors


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
    """Returns the content of eval/pairs.json, and those of answers.json and judge.json as `answers` and `judge`.

    Collective. For a run, its folder keeps the records and answers. For a model they are only returned.

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
            if subject.run is not None:
                path, record["end"] = subject.run.pairs_json, subject.run.find_end()
                decide_on_main_process(lambda: _write(path, record))
                say(str(path))
            if answers:
                with TemporaryDirectory(prefix="dpokit-answers-") as temporary:
                    folder = Path(temporary) if subject.run is None else subject.run.eval
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
    _write(folder / "judge.json", record)
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        if not path.parent.exists():
            path.parent.mkdir()
        write_json(path, record)
    except OSError as error:
        raise find_disk_trouble(error) or error from error
