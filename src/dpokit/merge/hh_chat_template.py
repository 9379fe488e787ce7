"""The HH transcript format as a chat template, for servers that need one to render a conversation."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpokit.data.transcripts import ASSISTANT, ROLES

JINJA, SERVE = "chat_template_hh.jinja", "chat_template_hh.json"


def write_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the template files if the tokenizer has no template: Jinja for vLLM, JSON for `transformers serve`.

    The tokenizer itself stays without a template. With one, the next run on this model would render every prompt by it,
    and the white space around an HH turn would be lost.
    """
    if tokenizer.chat_template is not None:
        return
    template = build_template(tokenizer)
    (folder / JINJA).write_text(template)
    (folder / SERVE).write_text(json.dumps({"chat_template": template}) + "\n")


def build_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Jinja that renders as `render_transcript` does, with the tokenizer's BOS, which servers do not add."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    roles, opening = json.dumps(ROLES), json.dumps(ASSISTANT)
    return (
        ("{{- bos_token -}}" if begins else "")
        + "{%- for message in messages -%}"
        + f"{{%- set name = {roles}.get(message['role'], message['role'].title()) -%}}"
        + r"{{- '\n\n' + name + ': ' + message['content'].strip() -}}"
        + "{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{- {opening} -}}}}{{%- endif -%}}"
    )
