"""Pairs that are too long: answers are cut first, then whole turns of the prompt, and only then its tokens."""

import json
import math
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpokit.data.columns import count_tokens, hash_prompts
from dpokit.data.layouts import match_layout
from dpokit.data.messages import UnusableError
from dpokit.data.prepare import prepare_data
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits, cut
from dpokit.data.tokens import Encoder
from dpokit.settings.flags import DataArguments

ANY = 99  # more tokens than the sizes below


def draw_case(draw: random.Random) -> tuple[list[int], list[int], list[int], LengthLimits]:
    prompt, chosen, rejected = ([*range(100 * part, 100 * part + draw.randint(1, 12))] for part in (1, 2, 3))
    prompt_tokens, answer_tokens, total = (draw.choice([None, *range(1, 26)]) for _ in range(3))
    limits = LengthLimits(prompt_tokens, answer_tokens, total, prompt_share=draw.choice([0, 0.3, 0.5, 0.8, 1]))
    return prompt, chosen, rejected, limits


@pytest.mark.parametrize("fixed", [0, 1])
def test_a_cut_respects_limits_and_shares_for_all_sizes(fixed):
    draw, kept = random.Random(fixed), 0
    for _ in range(5000):
        prompt, chosen, rejected, limits = draw_case(draw)
        total = limits.total_tokens or ANY
        try:
            p, c, r = cut(prompt, chosen, rejected, limits, fixed=fixed)
        except UnusableError as error:
            assert str(error) == "no_room"
            assert (limits.prompt_tokens or ANY) <= fixed or total < fixed + 2
            continue
        kept += 1
        answer = max(len(c), len(r))
        whole_prompt = min(len(prompt), limits.prompt_tokens or ANY)
        whole_answer = min(max(len(chosen), len(rejected)), limits.answer_tokens or ANY)
        assert p == prompt[:fixed] + prompt[len(prompt) - len(p) + fixed :]
        assert (c, r) == (chosen[: len(c)], rejected[: len(r)])
        assert len(p) <= whole_prompt and answer <= whole_answer and len(p) + answer <= total
        assert len(p) + answer == min(whole_prompt + whole_answer, total), "no token is cut without need"
        share = max(min(math.ceil(limits.prompt_share * total), total - 1), fixed + 1)
        if answer < whole_answer:
            assert len(p) == min(whole_prompt, share), "a cut answer leaves the prompt its share"
        if len(p) < whole_prompt:
            assert answer == min(whole_answer, total - share), "an answer is cut before the prompt"
    assert kept > 4000


def say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


SYSTEM = say("system", "Be brief.")
ROUNDS = [
    say("user", "How do I bake bread?"),
    say("assistant", "Mix flour and wait."),
    say("user", "How do I mix it?"),
    say("assistant", "No, not again."),
    say("user", "Ask the old teacher? " * 5),
]
ANSWERS = {"chosen": "Mix flour and wait.", "rejected": "No, not again."}


def open_chat(*messages: dict[str, str]) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def open_transcript(*messages: dict[str, str]) -> str:
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"\n\n{names[message['role']]}: {message['content'].strip()}" for message in messages]
    return "".join(turns) + "\n\nAssistant:"


def encode(tokenizer, prompt, limits: LengthLimits, answers: dict[str, str] = ANSWERS) -> dict:
    row = {"prompt": prompt, **answers}
    columns = Encoder(Renderer(tokenizer), match_layout([row], "test"), limits)({k: [v] for k, v in row.items()}, [0])
    return {name: values[0] for name, values in columns.items()}


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system turn", "system turn"])
@pytest.mark.parametrize("kind", ["chat", "transcript", "transcript text"])
def test_a_long_prompt_loses_whole_turns_first(kind, system, plain_tokenizer, chat_tokenizer):
    """For each limit, the prompt has as many of the last rounds as fit, and the system turn."""
    tokenizer, write = (chat_tokenizer, open_chat) if kind == "chat" else (plain_tokenizer, open_transcript)
    texts = [write(*system, *ROUNDS[first:]) for first in (0, 2, 4)]
    sizes = [len(Renderer(tokenizer).encode_prompts([text])[0]) for text in texts]
    prompt = texts[0] if kind == "transcript text" else [*system, *ROUNDS]
    for limit in range(sizes[2], sizes[0] + 1):
        encoded = encode(tokenizer, prompt, LengthLimits(limit))
        rounds = next(number for number, size in enumerate(sizes) if size <= limit)
        assert tokenizer.decode(encoded["prompt_ids"]) == texts[rounds]
        assert encoded["cut"] == ("turns" if rounds else "")


WORDS = " ".join(f"word{number}" for number in range(120))
# What a prompt of at most 150 tokens keeps: messages, the texts that must be there, and that must not.
LONG_PROMPTS = {
    "a long question": ([*ROUNDS[:2], say("user", WORDS)], ["word119"], ["word1 ", "bread"]),
    "a long question after a system turn": ([SYSTEM, say("user", WORDS)], ["Be brief.", "word119"], ["word1 "]),
    "a long system turn": ([say("system", WORDS), say("user", "What is it?")], ["word119", "What is it?"], ["word1 "]),
    "two long turns": (
        [say("system", WORDS), say("user", WORDS.upper())],
        ["word119", "WORD119"],
        ["word1 ", "WORD1 "],
    ),
    "a greeting": ([SYSTEM, say("assistant", WORDS), say("user", "What is it?")], ["Be brief.", "What is"], ["word1"]),
    "a long answer that goes on": (
        [SYSTEM, say("user", "What is it?"), say("assistant", WORDS)],
        ["Be brief.", "What is it?", "word119"],
        ["word1 "],
    ),
    "a long result of a tool": (
        [SYSTEM, say("user", "Which one?"), say("assistant", "Let me see."), say("tool", WORDS)],
        ["Be brief.", "Which one?", "word119"],
        ["word1 "],
    ),
}


@pytest.mark.parametrize("kind", ["chat", "transcript"])
@pytest.mark.parametrize("name", LONG_PROMPTS)
def test_the_longest_text_of_a_prompt_loses_its_start(name, kind, plain_tokenizer, chat_tokenizer):
    """Every header stays, and no question is lost for a long system turn or a long result."""
    messages, kept, lost = LONG_PROMPTS[name]
    if kind == "transcript" and "tool" in name:
        pytest.skip("a transcript has no tool calls")
    tokenizer, header = (chat_tokenizer, "<|im_start|>") if kind == "chat" else (plain_tokenizer, "\n\n")
    answers = {side: [say("assistant", text)] for side, text in ANSWERS.items()}
    encoded = encode(tokenizer, messages, LengthLimits(150), answers)
    text = tokenizer.decode(encoded["prompt_ids"])
    assert (100 if name != "a greeting" else 1) < len(encoded["prompt_ids"]) <= 150
    assert all(part in text for part in kept) and not any(part in text for part in lost)
    assert text.startswith(header)
    turns = {"a long question": 1, "a greeting": 2}.get(name, len(messages)) + (messages[-1]["role"] != "assistant")
    assert text.count(header) == turns


@pytest.mark.parametrize("text", ["\n\nHuman: " + WORDS, "\n\nHuman: " + WORDS + "\n\nAssistant:", WORDS])
def test_a_long_text_keeps_its_headers(text, plain_tokenizer, chat_tokenizer):
    for tokenizer, header in ((plain_tokenizer, "\n\nHuman: "), (chat_tokenizer, "<|im_start|>user\n")):
        encoded = encode(tokenizer, text, LengthLimits(100))
        prompt = tokenizer.decode(encoded["prompt_ids"])
        assert prompt.startswith(header) and "word119" in prompt and "word1 " not in prompt
        assert 95 < len(encoded["prompt_ids"]) <= 100 and encoded["cut"] == "prompt"


def test_headers_without_room_are_cut(chat_tokenizer):
    encoded = encode(chat_tokenizer, [SYSTEM, *ROUNDS], LengthLimits(12))
    assert (len(encoded["prompt_ids"]), encoded["cut"]) == (12, "turns prompt")


def test_a_rendered_prompt_and_a_raw_text_lose_their_start(plain_tokenizer, chat_tokenizer):
    raw = Renderer(plain_tokenizer, prompt_format="raw")
    for renderer, prompt in ((raw, "The sky is " * 30), (Renderer(chat_tokenizer), open_chat(*ROUNDS))):
        whole = renderer.encode_prompts([prompt])[0]
        row = {"prompt": prompt, **ANSWERS}
        encoder = Encoder(renderer, match_layout([row], "test"), LengthLimits(20))
        (ids,) = encoder({name: [value] for name, value in row.items()}, [0])["prompt_ids"]
        assert (len(ids), ids[-10:]) == (20, whole[-10:])


def test_answers_of_several_turns_keep_their_masks(chat_tokenizer):
    turns = {
        side: [say("assistant", text), say("user", "Why?"), say("assistant", "So.")] for side, text in ANSWERS.items()
    }
    whole, short = (encode(chat_tokenizer, [SYSTEM, *ROUNDS], LengthLimits(limit), turns) for limit in (None, 150))
    assert short["cut"] == "turns" and 0 in short["chosen_mask"]
    for name in ("chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "prompt_key", "whole_tokens"):
        assert short[name] == whole[name]


def prepare(file: Path, tokenizer, *, max_length: int | None = None, **flags):
    data = DataArguments(dataset_name=str(file), **flags)
    return prepare_data(data, tokenizer, max_length=max_length, with_eval="eval_fraction" in flags)


def write_rows(file: Path, prompts: list[str]) -> Path:
    rows = [{"prompt": prompt, "chosen": f" one {number}", "rejected": " two"} for number, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_many_cut_pairs_are_reported_with_a_better_limit(tmp_path, plain_tokenizer):
    prompts = [f"Number {number}: " + "yes " * number for number in range(100)]
    file = write_rows(tmp_path / "rows.jsonl", prompts)
    lengths = sorted(prompt + 1 for prompt in count_tokens(prepare(file, plain_tokenizer).train, ("prompt_ids",)))
    (finding,) = prepare(file, plain_tokenizer, max_length=60).findings
    better = [int(part.split()[1]) for part in finding.split("--")[1:]]
    for limit, share in zip(better, (0.05, 0.01), strict=True):
        cuts = prepare(file, plain_tokenizer, max_length=limit).tallies["train"].shortened["prompt"]
        assert cuts <= share * 100 < cuts + 1
    assert "training pairs" in finding and better[0] < better[1] <= lengths[-1] + 5
    assert prepare(file, plain_tokenizer, max_length=better[0]).findings == []
    (finding,) = prepare(file, plain_tokenizer, max_completion_length=1).findings or [""]
    assert "--max_prompt_length" in finding


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3, 0.5])
def test_prompts_with_one_end_are_held_out_by_the_whole(fraction, tmp_path, plain_tokenizer):
    """161 of 230 prompts end alike: cut to their end, they were one prompt, and all of them were held out."""
    ends = ["the same long end of a prompt " * 3] * 161 + [f"end {number}" for number in range(69)]
    file = write_rows(tmp_path / "rows.jsonl", [f"Start {number}: {end}" for number, end in enumerate(ends)])
    data = prepare(file, plain_tokenizer, max_length=12, eval_fraction=fraction)
    assert abs(len(data.eval) - fraction * 230) < 1
    assert len(set(hash_prompts(data.eval))) == len(data.eval)
    assert not any("also trained on" in finding for finding in data.findings)


def test_a_hold_out_is_within_one_prompt_of_its_share(tmp_path, plain_tokenizer):
    draw = random.Random(0)
    for trial in range(10):
        sizes = [draw.choice([1, 1, 2, 4, 9]) for _ in range(40)]
        prompts = [f"Prompt {trial} {at}" for at, size in enumerate(sizes) for _ in range(size)]
        file = write_rows(tmp_path / f"{trial}.jsonl", prompts)
        held_out = prepare(file, plain_tokenizer, eval_fraction=0.1).eval
        assert abs(len(held_out) - 0.1 * len(prompts)) <= max(sizes) / 2


def test_real_chats_keep_their_question(shared, chat_tokenizer):
    """Of 300 HH conversations at 256 tokens, every prompt begins with a role header and keeps half of the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    turns = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": turns, "eos_token": turns[1]})
    tokenizer.chat_template = chat_tokenizer.chat_template
    source = shared / "data" / "hh-rlhf" / "harmless-base" / "train.jsonl.gz"
    whole = prepare(source, tokenizer, max_train_samples=300)
    data = prepare(source, tokenizer, max_train_samples=300, max_length=256)
    counts = data.tallies["train"].shortened
    assert counts["turns"] > 0 and counts["answer"] > 0
    whole_prompts = {row["row"]: row["prompt_ids"] for row in whole.train}
    for row in data.train:
        assert tokenizer.decode(row["prompt_ids"]).startswith("<|im_start|>user\n")
        before = whole_prompts[row["row"]]
        assert row["prompt_ids"] == before or len(row["prompt_ids"]) <= 256
        assert row["prompt_ids"] == before or len(before) > 128
