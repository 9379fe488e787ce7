"""The HH format as a chat template beside a merged model: with it a server renders as dpokit does without."""

import copy
import json

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from dpokit.data.layouts import match_layout
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits
from dpokit.data.tokens import Encoder
from dpokit.data.transcripts import render_transcript
from dpokit.merge.hh_chat_template import JINJA, SERVE, write_template

QUESTION = {"role": "user", "content": "Why is the sky blue?"}
CONVERSATIONS = [
    [QUESTION],
    [
        QUESTION,
        {"role": "assistant", "content": "  It scatters.\n\nMuch. "},
        {"role": "user", "content": "\n\nMore?\n"},
    ],
    [{"role": "system", "content": "Be brief."}, QUESTION],
    [
        QUESTION,
        {"role": "tool result", "content": "{{ 'blue' }} {% raw %}"},
        {"role": "user", "content": "\u00e4 \u4f60 '\""},
    ],
]
ROWS = [
    [{"chosen": "\n\nHuman:  Why?  \n\nAssistant: So.", "rejected": "\n\nHuman:  Why?  \n\nAssistant: No."}],
    [{"prompt": " A plain beginning", "chosen": " goes on. ", "rejected": " ends."}],
    [
        {
            "prompt": [QUESTION],
            "chosen": [{"role": "assistant", "content": "So."}],
            "rejected": [QUESTION | {"role": "assistant"}],
        }
    ],
]


@pytest.fixture(params=[False, True], ids=["no BOS", "BOS"])
def tokenizer(request, plain_tokenizer):
    """A tokenizer without a chat template, and with or without a BOS at the start of each text."""
    made = copy.deepcopy(plain_tokenizer)
    if request.param:
        made.add_special_tokens({"bos_token": "<s>"})
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
    return made


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_server_gives_the_model_the_same_tokens_as_dpokit(messages, tokenizer, tmp_path):
    write_template(tmp_path, tokenizer)
    renderer = Renderer(tokenizer)
    text = renderer.open(messages)
    ids = renderer.encode_prompts([text])[0]
    options = json.loads((tmp_path / SERVE).read_text())
    assert options == {"chat_template": (tmp_path / JINJA).read_text()}
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    assert rendered.removeprefix("<s>") == text == render_transcript(messages)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
    assert encoded["input_ids"] == ids


@pytest.mark.parametrize("rows", ROWS)
def test_a_later_run_on_the_folder_renders_as_before(rows, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    write_template(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template is None
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    before, after = (
        Encoder(Renderer(loaded), match_layout(rows, "test"), LengthLimits())(columns, range(len(rows)))
        for loaded in (tokenizer, again)
    )
    assert before == after
    assert before["dropped"] == [""]


def test_a_tokenizer_that_has_a_template_keeps_it(chat_tokenizer, tmp_path):
    write_template(tmp_path, chat_tokenizer)
    assert list(tmp_path.iterdir()) == []
