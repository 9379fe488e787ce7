"""The quickstart's corpus: the requests and answers of its grammar, and its judgement of other answers."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from dpokit.quickstart.grammar import Request, Verdict, all_requests, judge_answer, write_corpus

SAMPLE = all_requests()[::97]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def broken(request: Request, answer: str) -> bool:
    return judge_answer(request.prompt, answer) == Verdict(kind=False, well_formed=False)


def test_every_answer_of_the_grammar_is_judged_correctly() -> None:
    for request in SAMPLE:
        for answer in request.kind_answers():
            assert judge_answer(request.prompt, answer) == Verdict(kind=True, well_formed=True)
        for answer in request.curt_answers():
            assert judge_answer(request.prompt, answer) == Verdict(kind=False, well_formed=True)


def test_prompts_are_thousands_distinct_ascii_transcripts() -> None:
    prompts = [request.prompt for request in all_requests()]
    assert len(set(prompts)) == len(prompts) >= 3_500
    assert all(p.isascii() and p.startswith("\n\nHuman: ") and p.endswith("\n\nAssistant:") for p in prompts)


def test_answers_begin_with_one_space_and_have_one_between_words() -> None:
    for request in SAMPLE:
        for answer in request.kind_answers() + request.curt_answers():
            assert answer.isascii() and answer == " " + " ".join(answer.split())


def test_a_dropped_or_a_doubled_word_breaks_an_answer() -> None:
    for request in SAMPLE:
        for answer in (request.kind_answers()[5], request.curt_answers()[5]):
            words = answer.split()
            for i in range(len(words)):
                assert broken(request, " " + " ".join(words[:i] + words[i + 1 :]))
                assert broken(request, " " + " ".join([*words[:i], words[i], *words[i:]]))


def test_a_kind_opening_with_a_curt_ending_is_broken() -> None:
    for request in SAMPLE:
        kind, curt = request.kind_answers()[0], request.curt_answers()[0]
        for cut in range(1, min(len(kind.split()), len(curt.split()))):
            mixed = " " + " ".join(kind.split()[:cut] + curt.split()[cut:])
            assert mixed in (kind, curt) or broken(request, mixed)


def test_an_answer_to_another_request_is_broken() -> None:
    for request, other in pairwise(SAMPLE):
        wrong = set(other.kind_answers()) - set(request.kind_answers())
        assert wrong and all(broken(request, answer) for answer in wrong)


@pytest.mark.parametrize("change", [str.strip, str.lower, lambda a: a + " ", lambda a: a + a, lambda a: a[:0]])
def test_an_answer_must_match_exactly(change: Callable[[str], str]) -> None:
    assert all(broken(request, change(request.kind_answers()[0])) for request in SAMPLE)


def test_a_prompt_outside_the_grammar_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a prompt of the toy corpus"):
        judge_answer("\n\nHuman: What is DPO?\n\nAssistant:", " Of course!")


def test_pairs_are_well_formed_and_the_files_share_no_prompt(tmp_path: Path) -> None:
    write_corpus(tmp_path, train_pairs=300, eval_pairs=100, seed=1)
    train, test = read(tmp_path / "train.jsonl"), read(tmp_path / "test.jsonl")
    assert (len(train), len(test)) == (300, 100)
    assert len({row["prompt"] for row in train + test}) == 400
    for row in train + test:
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert judge_answer(row["prompt"], row["chosen"]).kind
        assert judge_answer(row["prompt"], row["rejected"]) == Verdict(kind=False, well_formed=True)


def test_a_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_corpus(tmp_path / name, train_pairs=50, eval_pairs=20, seed=seed)
    for file in ("train.jsonl", "test.jsonl"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_more_pairs_than_requests_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs asked for"):
        write_corpus(tmp_path, train_pairs=len(all_requests()), eval_pairs=1, seed=0)


def test_both_kinds_have_similar_lengths(tmp_path: Path) -> None:
    write_corpus(tmp_path, train_pairs=1000, eval_pairs=0, seed=0)
    rows = read(tmp_path / "train.jsonl")
    kind, curt = (sum(len(row[name].split()) for row in rows) / len(rows) for name in ("chosen", "rejected"))
    assert abs(kind - curt) < 0.15 * max(kind, curt)
