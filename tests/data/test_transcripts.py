"""Transcripts of the form of HH become chat messages, and chat messages transcripts."""

import pytest

from dpokit.data.messages import UnusableError
from dpokit.data.transcripts import parse_prompt, parse_transcript, render_transcript

HH = "\n\nHuman: Why?\n\nAssistant:"
LONG_HH = "\n\nHuman: Why?\n\nAssistant: Who asks?\n\nHuman: Me.\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}
WHY = {"role": "user", "content": "Why?"}
ME = [WHY, {"role": "assistant", "content": "Who asks?"}, {"role": "user", "content": "Me."}]
YES = {"role": "assistant", "content": "Yes."}
CALL = {"function": {"name": "ask", "arguments": {"whom": "me"}}}


def test_a_transcript_survives_parsing_and_rendering():
    assert parse_transcript(LONG_HH) == ME
    assert render_transcript(parse_transcript(LONG_HH)) == LONG_HH


def test_a_plain_text_is_one_stripped_user_message():
    assert parse_transcript("  Why? ") == [WHY]


@pytest.mark.parametrize("text", ["Human: Why?\nAssistant:", "Human: Why?\n\nAssistant: ", "Human: Why?"])
def test_a_transcript_without_empty_lines_is_read(text):
    assert parse_transcript(text) == [WHY]


@pytest.mark.parametrize("text", ["### Question:\nWhy?\n", HH, "Human: Why?\nAssistant:"])
def test_a_raw_prompt_is_one_message_as_it_is(text):
    assert parse_prompt(text, is_raw=True) == [{"role": "user", "content": text}]
    assert parse_prompt(ME, is_raw=True) == parse_prompt(LONG_HH, is_raw=False) == ME


def test_an_empty_answer_is_left_out_of_a_transcript():
    assert parse_transcript("\n\nHuman: Why?\n\nAssistant:") == [WHY]


def test_text_before_the_first_human_turn_is_kept():
    messages = parse_transcript(f"Be brief.{HH}")
    assert any("Be brief." in message["content"] for message in messages)
    assert messages[-1]["content"].endswith("Why?")


def test_a_conversation_as_a_transcript_names_its_speakers():
    assert render_transcript([SYSTEM, *ME]) == f"\n\nSystem: Be brief.{LONG_HH}"


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_a_transcript_does_not_lose_what_a_message_says(key):
    with pytest.raises(UnusableError, match=rf"^needs_template \({key}\)$"):
        render_transcript([WHY, {**YES, key: [CALL]}])
