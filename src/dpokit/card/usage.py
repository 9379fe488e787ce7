"""Example code that loads a published model and generates an answer. No torch."""

import json
import re

from markupsafe import Markup

from dpokit.card.origin import Lineage
from dpokit.report.read import Run, read_object
from dpokit.rundir import RunDir

TRUST = ", trust_remote_code=True"  # for a model with custom code
LOAD_WHOLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name{trust})
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto"{trust})
"""
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, name = {base}, {name}
tokenizer = AutoTokenizer.from_pretrained(name{trust})
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="auto"{trust})
model = PeftModel.from_pretrained(model, name)
"""
ASK_CHAT = """
messages = [{"role": "user", "content": "How do I bake bread?"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)"""
ASK_TEXT = """
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)"""
HH_PROMPT = "\n\nHuman: How do I bake bread?\n\nAssistant:"
ANSWER = """
answer = model.generate(**inputs, max_new_tokens=200, do_sample=True)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def build_usage(folder: RunDir, run: Run, lineage: Lineage, repo_id: str | None) -> tuple[Markup, str]:
    """Returns the code, safe for a fenced block, and sentences to show below it.

    Args:
        repo_id: the model's repository; None for the run folder's name.
    """
    weights = _find_weights(folder, lineage)
    name = _quote(repo_id or f"{folder.path.resolve().name}/{weights}", otherwise="FOLDER")
    base = None if lineage.base is None or not lineage.base.on_hub else lineage.base.name
    trust = TRUST if run.setting("trust_remote_code") else ""
    if lineage.is_adapter:
        load = LOAD_ADAPTER.format(name=name, base=_quote(base or "BASE", otherwise="BASE"), trust=trust)
    else:
        load = LOAD_WHOLE.format(name=name, trust=trust)
    ask = ASK_CHAT if _has_template(folder, weights) else ASK_TEXT.format(prompt=_quote_prompt(run))
    notes = []
    if lineage.is_adapter and base is None:
        notes.append("Replace BASE by the model from which training started, which was a local folder.")
    if lineage.weights == "both":
        notes.append("The adapter is also in adapter/: PeftModel.from_pretrained(base, name, subfolder='adapter').")
    return Markup(load + ask + ANSWER), " ".join(notes)


def _find_weights(folder: RunDir, lineage: Lineage) -> str:
    """The name of the folder with the published weights."""
    if lineage.is_adapter:
        return folder.adapter.name
    return (folder.find_whole() or folder.model).name


def _has_template(folder: RunDir, weights: str) -> bool:
    path = folder.path / weights
    if (path / "chat_template.jinja").exists():
        return True
    config = read_object(path / "tokenizer_config.json", do="restore it from a copy of the folder") or {}
    return bool(config.get("chat_template"))


def _quote_prompt(run: Run) -> str:
    """A prompt in the form of the training data: an HH transcript, or plain text after `--prompt_format raw`."""
    return json.dumps("How do I bake bread?" if run.setting("prompt_format") == "raw" else HH_PROMPT)


def _quote(text: str, *, otherwise: str) -> str:
    """A Python literal of the text; of `otherwise` if the text has characters that could end a fence or mislead."""
    return json.dumps(text if re.fullmatch(r"[\w./? -]+", text, re.ASCII) else otherwise)
