"""A pretrained chat model from its GGUF file: it knows its tokens, learns from real pairs and still answers."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from planted_faults import FAULTS, planted
from smollm2 import fetch_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

import dpokit
from dpokit.evaluate.inputs import load_subject
from dpokit.model.generate import generate_answers
from dpokit.model.gguf import find_model_folder
from dpokit.model.score import LARGEST_IN_FP32, ScoredTokenCollator, prove, share_prefix

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TEXTS = {
    "The capital of France is": ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"],
    "Steps:\n\n1. Mix  2 cups": ["Steps", ":", "ĊĊ", "1", ".", "ĠMix", "ĠĠ", "2", "Ġcups"],
    "In 2023,\n  10": ["In", "Ġ", "2", "0", "2", "3", ",", "ĊĠĠ", "1", "0"],
}
MOST_LETTERS = 200  # of each conversation, so that a step takes about two seconds of one core


def read_chat(transcript: str) -> list[dict[str, str]]:
    """The messages of an HH transcript."""
    messages = []
    for turn in transcript.split("\n\nHuman:")[1:]:
        question, *answers = turn.split("\n\nAssistant:")
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return messages


def write_chats(shared: Path, path: Path, number: int) -> list[dict]:
    """Writes short real pairs as messages; returns them."""
    rows = []
    with gzip.open(shared / "data" / "hh-rlhf" / "harmless-base" / "train.jsonl.gz", "rt") as lines:
        for pair in map(json.loads, lines):
            chosen, rejected = read_chat(pair["chosen"]), read_chat(pair["rejected"])
            is_pair = chosen[:-1] == rejected[:-1] and chosen[-1]["content"] and rejected[-1]["content"]
            if is_pair and max(len(pair["chosen"]), len(pair["rejected"])) < MOST_LETTERS:
                rows.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
    assert len(rows) >= number
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:number]))
    return rows[:number]


def check_tokenizer(tokenizer) -> None:
    """Compares the tokenizer with what is published of SmolLM2's."""
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49_152)
    special = tokenizer.convert_ids_to_tokens(list(range(17)))
    assert special[0] == "<|endoftext|>"
    assert all(tokenizer(f"a{token}b")["input_ids"][1] == tokenizer.convert_tokens_to_ids(token) for token in special)
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    for text, tokens in TEXTS.items():
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    shown = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    user = f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n"
    assert shown == f"{SYSTEM}{user}<|im_start|>assistant\n"
    own_system = [{"role": "system", "content": "Be brief."}, *QUESTION]
    shown = tokenizer.apply_chat_template(own_system, add_generation_prompt=True, tokenize=False)
    assert shown == f"<|im_start|>system\nBe brief.<|im_end|>\n{user}<|im_start|>assistant\n"


def check_answer(model, tokenizer) -> None:
    """The model answers, ends its turn, and continues a plain text."""
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    (answer,) = generate_answers(model, tokenizer, [chat], max_new_tokens=12, temperature=0)
    assert answer.text.strip() == ANSWER
    assert answer.ended
    plain = tokenizer("The capital of France is")["input_ids"]
    (text,) = generate_answers(model, tokenizer, [plain], max_new_tokens=1, temperature=0)
    assert text.text == " Paris"


@pytest.mark.slow
@pytest.mark.long
def test_smollm2_learns_from_real_pairs_and_still_answers(shared, tmp_path):
    file = fetch_smollm2()
    folder = find_model_folder(str(file))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    check_answer(AutoModelForCausalLM.from_pretrained(folder), tokenizer)

    rows = write_chats(shared, tmp_path / "chats.jsonl", 12)
    settings = {"model_name_or_path": str(file), "dataset_name": str(tmp_path / "chats.jsonl"), "eval_fraction": 0.25}
    settings |= {"max_steps": 20, "per_device_train_batch_size": 1, "max_length": 256, "learning_rate": 1e-4}
    settings |= {"use_peft": True, "lora_target_modules": ["all-linear"], "lora_r": 8, "logging_steps": 1, "beta": 0.1}
    settings |= {"eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
    settings |= {"precompute_ref_log_probs": True, "bf16": True}
    began = time.monotonic()
    run = dpokit.train_model(settings | {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"})
    print(f"20 steps in {time.monotonic() - began:.0f} s, with the start")
    assert run.read_run()["shared_prefix"] == "on", "rounding in bf16 is no error"
    losses = [step["loss"] for step in dpokit.read_metrics(run.metrics_jsonl) if "loss" in step]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference are the same model at first"
    assert sum(losses[-5:]) < sum(losses[:5])

    subject = load_subject(str(run.path), base=None, data=None, split=None, argv=[])
    check_answer(subject.tuned, tokenizer)
    check_rows(subject.held_out.pairs, rows, tokenizer)

    dpokit.merge_model(run, limit=2)
    merged = AutoModelForCausalLM.from_pretrained(run.merged)
    ids = tokenizer.apply_chat_template([*rows[0]["prompt"], *rows[0]["chosen"]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tuned_logits, merged_logits = subject.tuned(input_ids=ids).logits, merged(input_ids=ids).logits
        with subject.as_base() as base:
            base_logits = base(input_ids=ids).logits
    assert (merged_logits - tuned_logits).abs().max() < 1e-3
    assert (base_logits - tuned_logits).abs().max() > 0.1, "the steps changed the model"
    check_answer(merged, AutoTokenizer.from_pretrained(run.merged))


@pytest.mark.slow
def test_in_bf16_each_fault_is_found_and_no_false_alarm_raised(shared, tmp_path):
    """With the short answers of real pairs, whose log-probs are small beside their rounding."""
    folder = find_model_folder(str(fetch_smollm2()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
    add_fused_lm_head(model)
    packed, collate = share_prefix(model), ScoredTokenCollator(tokenizer.pad_token_id)
    rows = [encode_pair(row, tokenizer) for row in write_chats(shared, tmp_path / "chats.jsonl", 8)]
    for first in range(0, 8, 2):
        proof = prove(model, packed, collate(rows[first : first + 2]))
        assert proof.mismatch is None
        assert 0.01 < proof.rounding < 0.1, "rounding is far above the limit of a comparison in fp32"
        assert proof.rounding > 10 * LARGEST_IN_FP32
    batch = collate(rows[:1])
    for fault in FAULTS:
        if fault != "another adapter":  # the model has none
            with planted(fault, model):
                assert prove(model, packed, batch).mismatch is not None, fault


def encode_pair(row: dict, tokenizer) -> dict[str, list[int]]:
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    wholes = {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
    ids = {side: tokenizer.apply_chat_template(whole)["input_ids"] for side, whole in wholes.items()}
    return {"prompt_ids": prompt, **{f"{side}_ids": whole[len(prompt) :] for side, whole in ids.items()}}


def check_rows(pairs, rows: list[dict], tokenizer) -> None:
    """The ids of prompt and answer are those of the whole conversation, up to the end of the answer's turn."""
    assert len(pairs) >= 2
    for pair in pairs:
        row = rows[find_row(pair, rows, tokenizer)]
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template([*row["prompt"], *row[side]])["input_ids"]
            end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
            assert pair["prompt_ids"] + pair[f"{side}_ids"] == whole[:end]


def find_row(pair: dict, rows: list[dict], tokenizer) -> int:
    prompts = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    return prompts.index(pair["prompt_ids"])
