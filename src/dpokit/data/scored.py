"""Published layouts of several answers with a label, a rank or scores. No torch."""

import json
import math
from collections.abc import Mapping
from typing import Any

from dpokit.data.formats import PROMPTS, Row
from dpokit.data.messages import UnusableError, describe_value, is_turns
from dpokit.data.published import Published, Ranking, ask, list_columns, read_texts, reply


def _read_number(value: Any, name: str) -> float:
    """Returns a label or a score. Raises: UnusableError for a row without one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UnusableError("missing_label", f"{name} is {describe_value(value)}")
    return number


def _rank_two(row: Row, preference: float) -> Ranking:
    """Returns the ranking of the columns `first` and `second`; the first is better if the preference is positive."""
    return Ranking([(row["first"], preference), (row["second"], 0.0)], row.get("prompt"))


def _prefer(value: Any, first: Any, second: Any, name: str) -> float:
    """Returns 1, -1, or 0 for a label that names neither answer. Raises: UnusableError without a label."""
    return float(_read_number(value, name) == first) - float(_read_number(value, name) == second)


def _rank_summaries(row: Row) -> Ranking:
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, Mapping) or not isinstance(summaries, (list, tuple)) or len(summaries) != 2:
        raise UnusableError("missing_text", f"summaries is {describe_value(summaries)}")
    heads = ("subreddit", "SUBREDDIT: r/"), ("title", "TITLE: "), ("post", "POST: "), ("article", "Article: ")
    lines = [head + str(info[key]).removeprefix("r/") for key, head in heads if info.get(key)]
    texts = [summary.get("text") if isinstance(summary, Mapping) else None for summary in summaries]
    pair = {"first": texts[0], "second": texts[1], "prompt": "\n\n".join([*lines, "TL;DR:"])}
    return _rank_two(pair, _prefer(row["label"], 0, 1, "choice"))


WINNERS = {
    **dict.fromkeys(("model_a", "a", "response_a"), 1.0),
    **dict.fromkeys(("model_b", "b", "response_b"), -1.0),
    **dict.fromkeys(("tie", "both", "both_good"), 0.0),
}
NUMBERS = {"1": 1.0, "2": -1.0}  # only of columns that are numbered so: others may count from 0


def _read_winner(row: Row) -> float:
    if "first_wins" in row:
        return _read_number(row["first_wins"], "winner_model_a") - _read_number(row["second_wins"], "winner_model_b")
    winner = str(row["winner"]).strip().lower().removesuffix(".0")
    if "bad" in winner or winner in ("neither", "none_of_both"):
        raise UnusableError("both_bad")
    winners = WINNERS if row.get("numbered") is None else WINNERS | NUMBERS
    if winner not in winners:
        raise UnusableError("missing_label", f"winner is {describe_value(row['winner'])}")
    return winners[winner]


def _rank_conversations(row: Row) -> Ranking:
    conversations = [row["first"], row["second"]]
    if not all(is_turns(turns) and not isinstance(turns, Mapping) for turns in conversations):
        raise UnusableError("missing_text", f"a conversation is {describe_value(conversations[0])}")
    if row.get("turns") is not None:  # MT-bench votes on the answer of one turn
        turns = _read_number(row["turns"], "turn")
        conversations = [turns_of[: 2 * int(turns)] if turns > 0 else turns_of for turns_of in conversations]
    return Ranking(list(zip(conversations, (_read_winner(row), 0.0), strict=True)))


def _rank_votes(row: Row) -> Ranking:
    prompts, *sides = (_parse_list(row[name]) for name in ("prompt", "first", "second"))
    is_text = prompts is None and isinstance(row["prompt"], str) and not row["prompt"].lstrip().startswith('["')
    if is_text or sides == [None, None]:
        return _rank_two(row, _read_winner(row))
    if prompts is None or any(side is None or len(side) != len(prompts) for side in sides):
        raise UnusableError("missing_text", "a list of questions has another number of answers")
    conversations = [
        [turn for question, answer in zip(prompts, side or (), strict=True) for turn in (ask(question), reply(answer))]
        for side in sides
    ]
    return Ranking(list(zip(conversations, (_read_winner(row), 0.0), strict=True)))


def _parse_list(value: Any) -> list[Any] | None:
    """Returns a list of texts, of which some may be null, also from JSON; None for another value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    is_list = isinstance(value, (list, tuple)) and all(isinstance(text, str | None) for text in value)
    return list(value) if is_list else None


def _rank_outputs(row: Row) -> Ranking:
    preference = _read_number(row["label"], "preference")  # from 1, the first, to 2, the second; 0 or 1.5 is a tie
    if preference != 0 and not 1 <= preference <= 2:
        raise UnusableError("missing_label", "preference is not from 1 to 2")
    return _rank_two(row, 0.0 if preference == 0 else 2 * (1.5 - preference))


def _rank_objects(row: Row) -> Ranking:
    """Returns the ranking of objects with an answer, and a score or a rank."""
    answers = []
    for entry in row["answers"] if isinstance(row["answers"], (list, tuple)) else ():
        if not isinstance(entry, Mapping):
            raise UnusableError("missing_text", f"an answer is {describe_value(entry)}")
        text = next(
            (entry[key] for key in ("answer", "response", "text", "completion", "content") if entry.get(key)), None
        )
        if entry.get("rank") is not None:
            answers.append((text, -_read_number(entry["rank"], "rank")))
        else:
            score = next(
                (entry[key] for key in ("overall_score", "score", "rating") if entry.get(key) is not None), None
            )
            answers.append((text, _read_number(score, "score")))
    if not answers:
        raise UnusableError("missing_text", f"answers is {describe_value(row['answers'])}")
    return Ranking(answers, row["prompt"])


def _rank_scored(row: Row) -> Ranking:
    answers, scores = read_texts(row["answers"], "responses"), row["scores"]
    if not isinstance(scores, (list, tuple)) or len(scores) != len(answers):
        raise UnusableError("missing_label", f"scores is {describe_value(scores)}")
    numbers = [_read_number(score, "scores") for score in scores]
    return Ranking(list(zip(answers, numbers, strict=True)), row["prompt"])


NUMBERED = ("response_1", "response1", "output_1", "answer_1")
FIRST = ("response_a", "answer_a", "output_a", "completion_a", *NUMBERED)
SECOND = ("response_b", "answer_b", "output_b", "completion_b", "response_2", "response2", "output_2", "answer_2")
SAFER_ID, BETTER_ID = ("safer_response_id",), ("better_response_id",)

# Tried after the layouts of `formats`.
RANKED = (
    Published(
        "SHP",
        "history, human_ref_A, human_ref_B: strings; labels: 1 if A is better, else 0",
        list_columns(prompt=("history",), first=("human_ref_A",), second=("human_ref_B",), label=("labels",)),
        lambda row: _rank_two(row, _prefer(row["label"], 1, 0, "labels")),
    ),
    Published(
        "summarize from feedback",
        "info: {post or article, title}; summaries: two of {text}; choice: 0 or 1",
        list_columns("info", "summaries", label=("choice",)),
        _rank_summaries,
    ),
    Published(
        "PKU-SafeRLHF",
        "prompt, response_0, response_1: strings; better_response_id: 0 or 1",
        list_columns(prompt=PROMPTS, first=("response_0",), second=("response_1",), label=BETTER_ID),
        lambda row: _rank_two(row, _prefer(row["label"], 0, 1, BETTER_ID[0])),
    ),
    Published(
        "PKU-SafeRLHF safer",
        "prompt, response_0, response_1: strings; safer_response_id: 0 or 1",
        list_columns(prompt=PROMPTS, first=("response_0",), second=("response_1",), label=SAFER_ID),
        lambda row: _rank_two(row, _prefer(row["label"], 0, 1, SAFER_ID[0])),
        by_name=True,
    ),
    Published(
        "HelpSteer",
        "prompt (or context), response_1, response_2: strings; preference_strength: -3 (the first) to 3",
        list_columns(
            prompt=(*PROMPTS, "context"),
            first=FIRST,
            second=SECOND,
            label=("preference_strength", "overall_preference"),
        ),
        lambda row: _rank_two(row, -_read_number(row["label"], "preference_strength")),
        list_columns(
            *("individual_preference", "preference_statement", "preference_elaboration"),
            *("three_most_similar_preferences", "all_preferences_unprocessed"),
        ),
        refuses_labels=True,
    ),
    Published(
        "WebGPT",
        "question: {full_text}; answer_0, answer_1: strings; score_0, score_1",
        list_columns(
            "score_0", "score_1", prompt=("question.full_text", *PROMPTS), first=("answer_0",), second=("answer_1",)
        ),
        lambda row: _rank_two(row, _read_number(row["score_0"], "score_0") - _read_number(row["score_1"], "score_1")),
        list_columns("quotes_0", "quotes_1", "tokens_0", "tokens_1"),
    ),
    Published(
        "arena conversations",
        "conversation_a, conversation_b: lists of {role, content}; winner: model_a, model_b, tie, ...",
        list_columns("winner", first=("conversation_a",), second=("conversation_b",)),
        _rank_conversations,
        list_columns(turns=("turn",)),
    ),
    Published(
        "arena",
        "prompt, response_a, response_b: strings, or lists of strings; winner_model_a, winner_model_b: 0 or 1",
        list_columns(
            prompt=PROMPTS,
            first=FIRST,
            second=SECOND,
            first_wins=("winner_model_a",),
            second_wins=("winner_model_b",),
        ),
        _rank_votes,
        list_columns("winner_tie"),
    ),
    Published(
        "votes",
        "prompt, response_a, response_b: strings; winner: a, b, tie, ...",
        list_columns("winner", prompt=PROMPTS, first=FIRST, second=SECOND),
        _rank_votes,
        list_columns(numbered=NUMBERED),
    ),
    Published(
        "AlpacaEval",
        "instruction, input, output_1, output_2: strings; preference: 1 or 2",
        list_columns(prompt=PROMPTS, first=("output_1",), second=("output_2",), label=("preference",)),
        _rank_outputs,
        list_columns("raw_completion", "datasplit"),
    ),
    Published(
        "ranked answers",
        "prompt (or instruction): string; answers (or completions): list of {answer or response, rank or score}",
        list_columns(prompt=PROMPTS, answers=("answers", "completions", "responses", "candidates")),
        _rank_objects,
        list_columns("correct_answers", "incorrect_answers"),
    ),
    Published(
        "scored answers",
        "prompt (or instruction): string; responses (or generations): list of strings; scores (or ratings): list",
        list_columns(
            prompt=PROMPTS,
            answers=(
                *("responses", "generations", "answers", "completions", "all_generated_responses", "candidates"),
                *("output", "outputs"),
            ),
            scores=("scores", "ratings", "all_rm_scores", "rewards"),
        ),
        _rank_scored,
    ),
)
