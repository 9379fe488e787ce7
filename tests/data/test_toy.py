"""The toy grammar: everything it writes is judged rightly, and nothing else."""

import json
import random

import pytest

from dpokit.data.toy import all_requests, judge_answer, write_corpus


def test_there_are_thousands_of_distinct_prompts():
    prompts = [request.prompt for request in all_requests()]
    assert len(prompts) == len(set(prompts)) >= 4000


def test_every_answer_is_well_formed_and_of_its_kind():
    for request in random.Random(0).sample(all_requests(), 100):
        for answer in request.kind_answers():
            verdict = judge_answer(request.prompt, answer)
            assert (verdict.kind, verdict.well_formed) == (True, True)
        for answer in request.curt_answers():
            verdict = judge_answer(request.prompt, answer)
            assert (verdict.kind, verdict.well_formed) == (False, True)


@pytest.mark.parametrize("damage", ["drop", "double", "mix", "other prompt", "run on", "no space"])
def test_a_damaged_answer_is_neither_kind_nor_well_formed(damage):
    draw = random.Random(1)
    requests = all_requests()
    for request in draw.sample(requests, 50):
        kind, curt = draw.choice(request.kind_answers()), draw.choice(request.curt_answers())
        words = kind.split(" ")
        place = draw.randrange(2, len(words))
        other = draw.choice([r for r in requests if r.words != request.words])
        broken = {
            "drop": " ".join(words[:place] + words[place + 1 :]),
            "double": " ".join([*words[:place], words[place - 1], *words[place:]]),
            "mix": kind[: kind.index("!") + 1] + curt[curt.index(".") + 1 :],
            "other prompt": draw.choice(other.kind_answers()),
            "run on": kind + kind,
            "no space": kind[1:],
        }[damage]
        verdict = judge_answer(request.prompt, broken)
        assert not verdict.kind and not verdict.well_formed, broken


def test_both_kinds_are_about_as_long():
    words = {"kind": 0, "curt": 0}
    for request in all_requests():
        words["kind"] += sum(len(answer.split()) for answer in request.kind_answers())
        words["curt"] += sum(len(answer.split()) for answer in request.curt_answers())
    assert 0.9 < words["kind"] / words["curt"] < 1.1


def test_a_corpus_is_the_same_for_a_seed_and_its_splits_share_no_prompt(tmp_path):
    for name in ("a", "b"):
        write_corpus(tmp_path / name, train_pairs=300, eval_pairs=100, seed=7)
    prompts = {}
    for split in ("train", "test"):
        texts = [(tmp_path / name / f"{split}.jsonl").read_text() for name in ("a", "b")]
        assert texts[0] == texts[1]
        prompts[split] = [json.loads(line)["prompt"] for line in texts[0].splitlines()]
    assert (len(prompts["train"]), len(prompts["test"])) == (300, 100)
    assert not set(prompts["train"]) & set(prompts["test"])


def test_more_pairs_than_prompts_and_foreign_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the grammar has"):
        write_corpus(tmp_path, train_pairs=10**6, eval_pairs=1, seed=0)
    with pytest.raises(ValueError, match="not a prompt"):
        judge_answer("\n\nHuman: Why?\n\nAssistant:", " Why not.")
