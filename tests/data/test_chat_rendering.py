"""Conversations in a model's chat template: masks, dates, ends, prompts that are rendered already, and refusals."""

import json
import random
from datetime import date
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from datasets.fingerprint import Hasher
from test_chat_templates import QUESTION, RESULT, TOOLS, build_tokenizer, call, say
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpokit.data.chat_rendering import ChatRenderer
from dpokit.data.formats import Pair
from dpokit.data.messages import Messages, UnusableError
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits
from dpokit.data.tokens import Encoder
from dpokit.errors import ModelError

FOLDER = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


def build_renderer(template: str, template_date: str | None = None) -> Renderer:
    return Renderer(build_tokenizer(template), template_date)


@pytest.fixture(scope="module")
def qwen3() -> Renderer:
    return build_renderer(read_template("qwen3"))


@pytest.fixture(scope="module")
def chatml() -> Renderer:
    return build_renderer(CHATML)


def encode(renderer: Renderer, pair: Pair, limits: LengthLimits | None = None) -> dict:
    layout = SimpleNamespace(to_pairs=lambda _: [pair])
    encoded = Encoder(renderer, layout, limits or LengthLimits())({"x": [0]}, [0])
    return {name: values[0] for name, values in encoded.items()}


def read_scored(renderer: Renderer, row: dict, side: str) -> str:
    mask = row[f"{side}_mask"] or [1] * len(row[f"{side}_ids"])
    return renderer.tokenizer.decode([id for id, scored in zip(row[f"{side}_ids"], mask, strict=True) if scored])


# -- the short way for plain answers -----------------------------------------------------------------------------------

TEXTS = [
    "Yes.",
    " Yes.",
    "    def f():\n        return 1",
    "a\n\n\nb ",
    "\u4f60\u597d",
    "1",
    "\"x\" <b> & 'y'",
    "No. <|im",
    "`x`\n",
]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.jinja")))
def test_plain_answers_are_rendered_as_by_the_long_way(name, monkeypatch):
    renderer = build_renderer(read_template(name))
    chance = random.Random(name)
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        prompt = [say(role, chance.choice(TEXTS).strip()) for role in roles]
        for answers in pairwise(TEXTS):
            pair = Pair(prompt, *answers)
            short = encode(renderer, pair)
            with monkeypatch.context() as patched:
                patched.setattr(ChatRenderer, "_find_frame", lambda *_: None)
                assert encode(renderer, pair) == short


def test_most_templates_render_plain_answers_the_short_way():
    names = [path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training")]
    pair = Pair(QUESTION, "Yes.", "No.")
    short = [name for name in names if not build_renderer(read_template(name)).render(pair).is_joined]
    assert len(short) > 0.9 * len(names)


# -- several turns ----------------------------------------------------------------------------------------------------

TURNS: Messages = [say("assistant", "It rains."), say("user", "And now?"), say("assistant", "Still.")]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3", "gptoss", "cohere2", "glm4moe", "qwen3"])
def test_the_assistants_turns_after_the_prompt_are_scored(name):
    renderer = build_renderer(read_template(name))
    row = encode(renderer, Pair(QUESTION, TURNS, "Go out."))
    if name == "glm4moe":
        expected = "\n<think></think>\nIt rains.<|user|>\n<think></think>\nStill.<eos>"
    else:
        assert row["dropped"] == ""
        expected = "".join(
            renderer.render(Pair(QUESTION, answer, "x")).chosen.text for answer in ("It rains.", "Still.")
        )
    if name in ("gptoss", "qwen3"):  # an earlier turn has another form than the last one
        assert "It rains." in read_scored(renderer, row, "chosen")
    else:
        assert read_scored(renderer, row, "chosen") == expected
    assert "And now?" not in read_scored(renderer, row, "chosen")
    assert "And now?" in renderer.tokenizer.decode(row["chosen_ids"])
    assert row["rejected_mask"] == []


def test_a_differing_question_is_not_scored(chatml):
    row = encode(chatml, Pair([say("system", "Be brief."), *QUESTION], TURNS, [say("assistant", "Sun."), *TURNS[1:]]))
    assert read_scored(chatml, row, "chosen") == "It rains.<|im_end|>Still.<|im_end|>"
    assert read_scored(chatml, row, "rejected") == "Sun.<|im_end|>Still.<|im_end|>"
    row = encode(chatml, Pair([say("system", "Be brief.")], [*QUESTION, *TURNS], [say("user", "Hi"), *TURNS[:1]]))
    assert read_scored(chatml, row, "rejected") == "It rains.<|im_end|>"


def test_a_limit_that_cuts_all_scored_tokens_drops_the_pair(chatml):
    pair = Pair([say("system", "Be brief.")], [*QUESTION, *TURNS], [say("user", "Hi"), *TURNS[:1]])
    assert encode(chatml, pair, LengthLimits(answer_tokens=8))["dropped"] == "no_room"


def test_tool_calls_between_the_turns_are_scored_and_results_not():
    renderer = build_renderer(read_template("qwen2_5"))
    answer = [say("assistant", None, tool_calls=[call(city="Oslo")]), RESULT, say("assistant", "Rain.")]
    scored = read_scored(renderer, encode(renderer, Pair(QUESTION, answer, "No.", TOOLS)), "chosen")
    assert '"arguments": {"city": "Oslo"}' in scored
    assert "tool_response" not in scored


def test_a_plain_model_scores_the_assistants_turns(plain_tokenizer):
    renderer = Renderer(plain_tokenizer)
    row = encode(renderer, Pair(QUESTION, TURNS, "Go out."))
    assert read_scored(renderer, row, "chosen") == f" It rains. Still.{plain_tokenizer.eos_token}"


# -- ends and beginnings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3", ["<eos>", "<|im_end|>"]),
        ("llama3_1", ["<eos>", "<|eot_id|>"]),
        ("gemma3", ["<eos>", "<end_of_turn>"]),
        ("phi3", ["<eos>", "<|end|>"]),
        ("gptoss", ["<eos>", "<|return|>", "<|call|>"]),
        ("cohere2", ["<eos>", "<|END_OF_TURN_TOKEN|>"]),
        ("glm4moe", ["<eos>"]),
    ],
)
def test_the_tokens_that_end_a_turn(name, ends):
    renderer = build_renderer(read_template(name))
    assert renderer.tokenizer.convert_ids_to_tokens(list(renderer.ends)) == ends


@pytest.mark.parametrize("end", ["<|im_end|>", "<eos>", "<|im_end|>\n", "<|im_end|> <eos>"])
def test_an_answer_that_carries_an_end_has_it_once(end, chatml):
    assert chatml.render(Pair(QUESTION, f"Yes.{end}", "No.")).chosen.text == "Yes.<|im_end|>"
    answer = [say("assistant", f"Yes.{end}")]
    assert chatml.render(Pair(QUESTION, answer, "No.")).chosen.text == "Yes.<|im_end|>"


@pytest.mark.parametrize("bos", ["<bos>", ""])
def test_a_rendered_prompt_is_taken_as_it_is_with_one_bos(bos):
    renderer = build_renderer("{{ bos_token }}" + CHATML)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    rendered = renderer.render(Pair(bos + prompt, "Yes.", "No.<|im_end|>"))
    assert rendered.prompt == "<bos>" + prompt
    assert (rendered.chosen.text, rendered.rejected.text) == ("Yes.<|im_end|>", "No.<|im_end|>")


@pytest.mark.parametrize("prompt", ["<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", "[INST] Hi [/INST]"])
def test_a_prompt_for_another_model_is_dropped(prompt, chatml):
    with pytest.raises(UnusableError, match="rendered_for_other_model"):
        chatml.render(Pair(prompt, "Yes.", "No."))


def test_white_space_is_kept_where_the_template_keeps_it(chatml):
    code = "    return 1\n"
    assert chatml.render(Pair(QUESTION, code, "x")).chosen.text == f"{code}<|im_end|>"
    strict = build_renderer(CHATML.replace("m.content", "m.content | trim"))
    assert strict.render(Pair(QUESTION, code, "x")).chosen.text == "return 1<|im_end|>"


def test_answers_continue_the_assistants_words(chatml):
    rendered = chatml.render(Pair([*QUESTION, say("assistant", "It")], " rains.", [say("assistant", " snows.")]))
    assert rendered.prompt.endswith("<|im_start|>assistant\nIt")
    assert (rendered.chosen.text, rendered.rejected.text) == (" rains.<|im_end|>", " snows.<|im_end|>")


# -- reasoning and tools ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["<think>\nI look.\n</think>\n\nYes.", "<think>I look.</think>Yes."])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_8", "deepseek_r1_distill", "nemotron_3_nano"])
def test_reasoning_is_in_one_block(name, content):
    renderer = build_renderer(read_template(name))
    for answer in (content, [say("assistant", content)], [say("assistant", "Yes.", reasoning_content="I look.")]):
        rendered = renderer.render(Pair(QUESTION, answer, "No."))
        whole = rendered.prompt + rendered.chosen.text
        assert (whole.count("<think>"), whole.count("</think>"), whole.count("I look.")) == (1, 1, 1)


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
@pytest.mark.parametrize("name", ["qwen2_5", "deepseekv3", "llama3_1"])
def test_arguments_of_a_call_may_be_text(name, arguments):
    renderer = build_renderer(read_template(name))
    answer = [
        say("assistant", "", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])
    ]
    text = renderer.render(Pair(QUESTION, answer, "No.", TOOLS)).chosen.text
    assert '{"city": "Oslo"}' in text


def test_arguments_that_are_no_json_drop_the_pair():
    renderer = build_renderer(read_template("qwen2_5"))
    answer = [say("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": "{Oslo"}}])]
    with pytest.raises(UnusableError, match="bad_arguments"):
        renderer.render(Pair(QUESTION, answer, "No.", TOOLS))


def test_tools_that_a_template_leaves_out_are_counted(chatml):
    assert encode(chatml, Pair(QUESTION, "Yes.", "No.", TOOLS))["notes"] == "tools_left_out"


# -- templates --------------------------------------------------------------------------------------------------------


def test_a_date_is_that_of_the_run():
    template = read_template("llama3_2")
    assert "29 Nov 2026" in build_renderer(template, "2026-11-29").open(QUESTION)
    assert date.today().strftime("%d %b %Y") in build_renderer(template).open(QUESTION)


def test_a_template_may_demand_a_system_turn():
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    renderer = build_renderer(template)
    system = say("system", "Be brief.")
    assert renderer.render(Pair([system, *QUESTION], "Yes.", "No.")).chosen.text == "Yes.<|im_end|>"
    assert encode(renderer, Pair(QUESTION, "Yes.", "No."))["dropped"] == "refused_by_template"


def test_templates_without_a_default_are_one_message():
    tokenizer = build_tokenizer(CHATML)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(ModelError, match="rag, tool_use") as refusal:
        Renderer(tokenizer)
    assert "default" in refusal.value.expected


def test_a_template_for_tools_is_used_for_rows_with_tools():
    tokenizer = build_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools[0].function.name }}" + CHATML}
    rendered = Renderer(tokenizer).render(Pair(QUESTION, "Yes.", "No.", TOOLS))
    assert rendered.prompt.startswith("find_weather")
    assert rendered.notes == frozenset()


def test_a_template_that_repeats_the_answer_is_refused():
    with pytest.raises(ModelError, match="repeats the assistant's answer"):
        build_renderer(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"))


@pytest.mark.parametrize(("template", "is_dated"), [(CHATML, False), ("{{ strftime_now( '%Y' ) }}" + CHATML, True)])
def test_prepared_rows_are_of_a_day_only_if_the_template_is(template, is_dated):
    tokenizer = build_tokenizer(template)
    days = (None, "2026-01-01", "2027-11-30")
    hashes = {Hasher.hash(Renderer(tokenizer, day).chat) for day in days}
    assert len(hashes) == (3 if is_dated else 1)


# -- nothing is lost without a word ------------------------------------------------------------------------------------

REASONED = say("assistant", "Hm.", reasoning_content="I look.")
CALL = [say("assistant", "", tool_calls=[call(city="Oslo")])]
SCHEMA_ONLY = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
NO_WORDS = {
    "an end": "END",
    "EOS": "<eos>",
    "an end of several": [*TURNS[:2], say("assistant", " END")],
    "a blank last turn": [*TURNS[:2], say("assistant", "  ")],
}


@pytest.mark.parametrize("case", NO_WORDS)
@pytest.mark.parametrize(
    ("template", "end"), [("qwen3", "<|im_end|>"), ("gemma", "<end_of_turn>"), (CHATML, "<|im_end|>")]
)
def test_an_answer_without_words_is_dropped(case, template, end):
    renderer = build_renderer(template if "{" in template else read_template(template))
    answer = json.loads(json.dumps(NO_WORDS[case]).replace("END", end))
    assert encode(renderer, Pair(QUESTION, "Yes.", answer))["dropped"] == "empty_answer"


# Template, pair, and the reason of its drop.
LOST = {
    "a call beside its schema": (SCHEMA_ONLY, Pair(QUESTION, CALL, "No.", TOOLS), "left_out_by_template (tool_calls)"),
    "reasoning alone": (
        CHATML,
        Pair(QUESTION, [say("assistant", None, reasoning_content="I look.")], "No."),
        "left_out_by_template (reasoning)",
    ),
    "a tool's result": ("phi3", Pair([*QUESTION, RESULT, *QUESTION], "Yes.", "No."), "left_out_by_template (tool)"),
    "a question": (
        "{% for m in messages %}{% if m.role != 'user' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        Pair(QUESTION, "Yes.", "No."),
        "left_out_by_template (user)",
    ),
    "words after a second </think>": (
        "qwen3",
        Pair(QUESTION, "<think>\nI look.\n</think>\n\nThe tag </think> ends it.", "No."),
        "left_out_by_template",
    ),
    "a rendered conversation as answer": (
        CHATML,
        Pair(QUESTION, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>", "No."),
        "rendered_answer",
    ),
    "a rendered question in a message": (
        CHATML,
        Pair([say("system", "Be brief."), say("user", "<|im_start|>user\nHi<|im_end|>\n")], "Yes.", "No."),
        "rendered_prompt",
    ),
    "tools beside a rendered prompt": (CHATML, Pair("<|im_start|>user\nHi", "Yes.", "No.", TOOLS), "rendered_prompt"),
    "an answer for another model": (
        CHATML,
        Pair(QUESTION, "<start_of_turn>model\nYes.<end_of_turn>", "No."),
        "rendered_for_other_model",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_a_pair_that_would_lose_words_is_dropped(case):
    template, pair, reason = LOST[case]
    renderer = build_renderer(template if "{" in template else read_template(template))
    assert encode(renderer, pair)["dropped"] == reason


# Template, pair, the note, and the text of prompt and chosen answer.
NOTED = {
    "another role": (
        "qwen3",
        Pair([say("developer", "Be brief."), *QUESTION], "Yes.", "No."),
        "other_role",
        "<|im_start|>system\nBe brief.<|im_end|>\n",
    ),
    "reasoning of an earlier turn": (
        "qwen3",
        Pair(
            QUESTION, [say("assistant", "Hm.", reasoning_content="I look."), *QUESTION, say("assistant", "Yes.")], "No."
        ),
        "reasoning_left_out",
        "Yes.<|im_end|>",
    ),
    "an argument that is not read": (
        "qwen3",
        Pair(QUESTION, "Yes.", "No.", template_kwargs={"enable_thinkin": False}),
        "argument_left_out",
        "Yes.<|im_end|>",
    ),
    "a rendered prompt": (
        CHATML,
        Pair("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\nYes.<|im_end|>", "<|im_start|>assistant\nNo."),
        "rendered_already",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>",
    ),
}


@pytest.mark.parametrize("case", NOTED)
def test_a_pair_that_is_rendered_in_another_way_is_counted(case):
    template, pair, note, text = NOTED[case]
    renderer = build_renderer(template if "{" in template else read_template(template))
    row = encode(renderer, pair)
    assert (row["dropped"], row["notes"]) == ("", note)
    assert text in renderer.tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])


# Template, pair, and the text of prompt and chosen answer, from the first question on.
WHOLE = {
    "a question that mentions the end of a turn": (
        CHATML,
        Pair("What does <|im_end|> mean?", "The end.", "No."),
        "What does <|im_end|> mean?<|im_end|>\n<|im_start|>assistant\nThe end.<|im_end|>",
    ),
    "ends and BOS that the row has": (
        "gemma",
        Pair([say("user", "<bos>Hi<end_of_turn>")], "Yes.<end_of_turn>\n", "No."),
        "Hi<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>",
    ),
    "an end of an earlier turn": (
        CHATML,
        Pair([say("user", "Hi")], [say("assistant", "Hm.<|im_end|>"), *QUESTION, say("assistant", "Yes.")], "No."),
        f"Hi<|im_end|>\n<|im_start|>assistant\nHm.<|im_end|>\n<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>",
    ),
    "an answer with the beginning of its turn": (
        CHATML,
        Pair("Hi", "<|im_start|>assistant\nYes.<|im_end|>", "No."),
        "Hi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>",
    ),
    "an indented answer after reasoning that dpokit wrote": (
        "deepseek_r1_distill",
        Pair("Hi", [say("assistant", "    if x:\n        return 1")], "No."),
        "Hi<\uff5cAssistant\uff5c><think>\n\n</think>\n\n    if x:\n        return 1"
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_words_of_the_template_stand_once_and_others_stay(case):
    template, pair, text = WHOLE[case]
    renderer = build_renderer(template if "{" in template else read_template(template))
    row = encode(renderer, pair)
    assert row["dropped"] == ""
    whole = renderer.tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
    assert whole[whole.index(text[:2]) :] == text


def build_llama2() -> PreTrainedTokenizerFast:
    """A tokenizer with Llama 2's normalizer, which writes a space before each text."""
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    letters = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(letters)
    special = ["<unk>", *(f"<0x{number:02X}>" for number in range(256))]
    model.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def build_trimming() -> PreTrainedTokenizerFast:
    """A tokenizer that leaves white space out of the positions of its tokens, as `tokenizers` does by default."""
    tokenizer = build_tokenizer(CHATML)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(("build", "end"), [(build_llama2, "</s>"), (build_trimming, "<|im_end|>")])
def test_scored_tokens_are_found_with_tokenizers_of_other_kinds(build, end):
    renderer = Renderer(build())
    turns = [say("assistant", "a b\n  c \U0001f642"), say("user", "And now?"), say("assistant", "Still.")]
    row = encode(renderer, Pair(QUESTION, turns, "No."))
    assert read_scored(renderer, row, "chosen") == f"a b\n  c \U0001f642{end}Still.{end}"
