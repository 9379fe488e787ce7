"""A text prompt and its answers meet as an HH transcript on a model without a chat template, or as they are."""

import copy
import json

import pytest

from dpokit.data.formats import Pair
from dpokit.data.messages import UnusableError
from dpokit.data.prepare import prepare_data
from dpokit.data.rendering import Renderer
from dpokit.data.tally import print_report
from dpokit.errors import DataError, SettingsError
from dpokit.model.base_and_tuned import find_run, read_run_defaults
from dpokit.settings.flags import DataArguments

HH = "\n\nHuman: Why?\n\nAssistant:"
CHATML = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"

# prompt, answer, and the two as a model without a chat template reads them
TRANSCRIPTS = {
    "a question": ("Why?", "So.", (HH, " So.")),
    "white space around it": (" Why?\n", "So. ", (HH, " So. ")),
    "an answer with a space": ("Why?", " So.", (HH, " So.")),
    "an indented answer": ("Why?", "    def f():", (HH, "    def f():")),
    "an answer on a new line": ("Why?", "\nSo.", (HH, "\nSo.")),
    "a transcript": (HH, " So.", (HH, " So.")),
    "a transcript without the answer's space": (HH, "So.", (HH, " So.")),
    "a transcript with a space at its end": (f"{HH} ", "So.", (HH, " So.")),
    "a transcript without empty lines before it": (HH.strip(), " So.", (HH.strip(), " So.")),
    "a transcript with single lines": ("Human: Why?\nAssistant:", "So.", (HH, " So.")),
    "turns without empty lines before them": (
        "Human: Why?\n\nAssistant: So.\n\nHuman: Oh?",
        "Yes.",
        (f"{HH} So.\n\nHuman: Oh?\n\nAssistant:", " Yes."),
    ),
    "an answer's beginning after single lines": ("Human: Why?\nAssistant: It is", " so.", (f"{HH} It is", " so.")),
    "a transcript that ends with a question": ("\n\nHuman: Why?", "So.", (HH, " So.")),
    "several turns": (f"{HH} So.\n\nHuman: Oh?", "Yes.", (f"{HH} So.\n\nHuman: Oh?\n\nAssistant:", " Yes.")),
    "the beginning of an answer": (f"{HH} It is", " so.", (f"{HH} It is", " so.")),
    "another template of words": (
        "### Instruction:\nWhy?\n\n### Response:\n",
        "So.",
        ("\n\nHuman: ### Instruction:\nWhy?\n\n### Response:\n\nAssistant:", " So."),
    ),
}


def render(renderer: Renderer, prompt: str, answer: str) -> tuple[str, str]:
    rendered = renderer.render(Pair(prompt, answer, " No."))
    return rendered.prompt, rendered.chosen.text.removesuffix(renderer.eos)


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_a_text_meets_its_answer_as_a_transcript(case, plain_tokenizer):
    prompt, answer, expected = TRANSCRIPTS[case]
    assert render(Renderer(plain_tokenizer), prompt, answer) == expected


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_a_raw_text_stays_as_it_is(case, plain_tokenizer):
    prompt, answer, _ = TRANSCRIPTS[case]
    assert render(Renderer(plain_tokenizer, prompt_format="raw"), prompt, answer) == (prompt, answer)


@pytest.mark.parametrize("prompt_format", ["transcript", "raw"])
def test_a_question_in_a_chat_has_the_ids_of_training(prompt_format, plain_tokenizer):
    renderer = Renderer(plain_tokenizer, prompt_format=prompt_format)
    trained = renderer.encode_prompts([renderer.render(Pair("Why?", "So.", "No.")).prompt])[0]
    assert renderer.encode_messages([{"role": "user", "content": "Why?"}]) == trained


WHY, SO = {"role": "user", "content": "Why?\n"}, {"role": "assistant", "content": "So."}
# pairs that have roles, which raw texts leave out
CONVERSATIONS = {
    "a system turn": Pair([{"role": "system", "content": "Be brief."}, WHY], "So.", "No."),
    "several turns": Pair([WHY, SO, WHY], "So.", "No."),
    "the beginning of an answer": Pair([WHY, SO], " Yes.", " No."),
    "several turns of an answer": Pair([WHY], [SO, WHY, SO], [SO, WHY, {**SO, "content": "No."}]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_raw_conversation_is_dropped_instead_of_a_transcript(case, plain_tokenizer):
    with pytest.raises(UnusableError, match=r"^raw_conversation$"):
        Renderer(plain_tokenizer, prompt_format="raw").render(CONVERSATIONS[case])


def test_a_raw_question_as_a_message_is_trained_as_it_is_asked(plain_tokenizer):
    renderer = Renderer(plain_tokenizer, prompt_format="raw")
    rendered = renderer.render(Pair([WHY], [SO], "No."))
    assert (rendered.prompt, rendered.chosen.text) == ("Why?\n", f"So.{renderer.eos}")
    assert renderer.encode_prompts([rendered.prompt])[0] == renderer.encode_messages([WHY])


def test_raw_conversations_alone_are_an_error_with_the_flag(tmp_path, plain_tokenizer):
    row = {"prompt": [WHY, SO, WHY], "chosen": [SO], "rejected": [{**SO, "content": "No."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), prompt_format="raw")
    with pytest.raises(DataError, match="1 raw_conversation") as error:
        prepare_data(data, plain_tokenizer, max_length=None, with_eval=False)
    assert "leave --prompt_format raw out" in error.value.do


def test_a_raw_conversation_with_a_tool_call_has_a_reason(plain_tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(UnusableError, match="needs_template"):
        Renderer(plain_tokenizer, prompt_format="raw").open([WHY, call, WHY])


def test_a_prompt_of_another_model_s_template_is_dropped(plain_tokenizer):
    with pytest.raises(UnusableError, match="rendered_for_other_model"):
        render(Renderer(plain_tokenizer), CHATML, "So.")


def test_a_prompt_with_the_model_s_own_control_tokens_stays(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    assert render(Renderer(tokenizer), CHATML, "So.") == (CHATML, "So.")


def test_raw_prompts_with_a_chat_template_are_an_error(chat_tokenizer):
    with pytest.raises(SettingsError, match="has a chat template"):
        Renderer(chat_tokenizer, prompt_format="raw")


# layout of an older run, its further files, the settings that it recorded, and the form of its prompts
OLDER_RUNS = [
    ("explicit, plain", {}, {}, "raw"),
    ("implicit, plain", {}, {}, "raw"),
    ("HH transcript", {}, {}, None),
    ("explicit, plain", {"model/chat_template.jinja": "x"}, {}, None),
    ("explicit, plain", {}, {"prompt_format": {"value": "transcript", "origin": "default"}}, None),
    ("explicit, plain", {"data.json": "[" * 9}, {}, None),
]


@pytest.mark.parametrize(("layout", "files", "settings", "expected"), OLDER_RUNS)
def test_a_run_from_before_the_flag_keeps_its_raw_prompts(layout, files, settings, expected, tmp_path):
    run = {"format": 1, "settings": {"model_name_or_path": {"value": "m", "origin": "flag"}, **settings}}
    files = {"run.json": json.dumps(run), "data.json": json.dumps({"train": {"format": layout}}), **files}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    _, record = find_run(str(tmp_path))
    assert read_run_defaults(record, str(tmp_path)).get("prompt_format") == expected


def prepare(tmp_path, tokenizer, answer: str, prompt_format: str = "transcript"):
    rows = [{"prompt": f"Why {n}?", "chosen": f"{answer} {n}.", "rejected": f"{answer}, no."} for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments(dataset_name=str(path), prompt_format=prompt_format)
    return prepare_data(data, tokenizer, max_length=None, with_eval=False).record()


def test_the_flag_changes_the_data_and_is_recorded(tmp_path, plain_tokenizer, chat_tokenizer, capsys):
    transcript, raw = (prepare(tmp_path, plain_tokenizer, " So", form) for form in ("transcript", "raw"))
    assert transcript["fingerprint"] != raw["fingerprint"]
    assert (transcript["prompt_form"], raw["prompt_form"]) == ("HH transcript", "raw")
    assert prepare(tmp_path, chat_tokenizer, " So")["prompt_form"] == "chat template"
    print_report(raw)
    assert "form of the prompts: raw" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "prompt_format", "number"), [("So", "raw", 1), (" So", "raw", 0), ("So", "", 0)])
def test_raw_rows_without_a_separator_are_a_finding(answer, prompt_format, number, tmp_path, plain_tokenizer):
    findings = prepare(tmp_path, plain_tokenizer, answer, prompt_format or "transcript")["findings"]
    assert len(findings) == number
    assert all("3 of 3 train pairs" in line and "--prompt_format raw" in line for line in findings)
