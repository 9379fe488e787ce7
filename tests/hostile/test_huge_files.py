"""Files of a tebibyte in a run folder are not read into memory, and no verb hangs on them."""

import os
import shutil
import time

import pytest
from run_folders import add_evaluation, make_run, make_steps

from dpokit.card.card import write_card
from dpokit.checkpoint.store import describe_files, find_checkpoints, find_part, list_files, seal
from dpokit.cluster.status import read_status
from dpokit.errors import DpokitError
from dpokit.merge.merge import merge_run
from dpokit.model.base_and_tuned import find_run
from dpokit.model.load import load_tokenizer
from dpokit.push.bundle import build_bundle
from dpokit.report.page import write_report
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings

HUGE = 2**40
MOST_SECONDS = 20.0
FILES = (
    *("run.json", "metrics.jsonl", "data.json", "README.md", "votes.jsonl", "report/report.html"),
    *("eval/pairs.json", "eval/answers.json", "eval/answers.jsonl", "eval/judge.json", "merged/merge.json"),
    *("eval/later/pairs.json", "eval/later/answers.jsonl"),
    *("model/config.json", "model/tokenizer.json", "model/tokenizer_config.json", "model/generation_config.json"),
    *("model/chat_template.jinja", "model/special_tokens_map.json", "model/notes.txt"),
    *("checkpoint-3/manifest.json", "checkpoint-3/trainer_state.json", "checkpoint-3/progress_0.json"),
)


def load_model_files(run: RunDir) -> object:
    argv = ["--model_name_or_path", str(run.model), "--output_dir", str(run.path.with_name("other")), "--use_cpu"]
    return load_tokenizer(load_settings("dpo_gpt2", {}, argv).model)


VERBS = {
    "status": read_status,
    "verify": lambda run: find_checkpoints(run, deep=False),
    "report": lambda run: write_report([run.path]),
    "card": lambda run: write_card(run, license="mit"),
    "merge": merge_run,
    "push": build_bundle,
    "evaluate, chat, serve": lambda run: find_run(str(run.path)),
    "a model's files": load_model_files,
    "train": RunDir.make,
}


@pytest.fixture
def run(tiny_gpt2, tmp_path) -> RunDir:
    made = RunDir(make_run(tmp_path / "run", make_steps(5, every=1)))
    add_evaluation(made.path)
    shutil.copytree(tiny_gpt2, made.model)
    made.merged.mkdir()
    made.card.write_text("---\nlicense: mit\n---\n\n# Tiny\n")
    part = find_part(made, 3)
    part.mkdir()
    for name in ("trainer_state.json", "progress_0.json"):
        (part / name).write_text("{}")
    facts = {"world_size": 1, "placement": "one device", "settings": {}}
    seal(made, 3, describe_files(part, list_files(part)), facts)
    return made


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FILES)
def test_a_huge_file_is_not_read(name, verb, run):
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, HUGE)
    began = time.monotonic()
    try:
        VERBS[verb](run)
    except DpokitError as error:
        assert str(run.path) in error.seen
    assert time.monotonic() - began < MOST_SECONDS
