"""Local models: answers as generate samples them, the trainer's rewards, one copy of the base, safetensors only."""

import json

import pytest
import torch
from peft import PeftModel
from served import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.errors import ModelError, RunFolderError, SettingsError
from dpokit.model.generate import generate_answers
from dpokit.rundir import RunDir
from dpokit.serve.models import LocalModels, ModelReply
from dpokit.serve.request_limits import RefusedError, SamplingSettings

QUESTION = [{"role": "user", "content": "How do I bake bread?"}]
RENDERED = "\n\nHuman: How do I bake bread?\n\nAssistant:"
SAMPLING = SamplingSettings(temperature=0.9, top_p=0.9, max_new_tokens=20, seed=3)


@pytest.fixture(scope="module", params=["full", "adapter"])
def run(request, tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp(request.param), tiny_gpt2, use_peft=request.param == "adapter")


@pytest.fixture
def models(run) -> LocalModels:
    loaded = LocalModels(str(run.path), None)
    loaded.load()
    return loaded


def answer(models, side, messages=QUESTION, sampling=SAMPLING, updates=None) -> ModelReply:
    updates = [] if updates is None else updates
    return models.answer(side, messages, sampling, on_text=updates.append, is_stopped=lambda: False)


def load(run: RunDir, side: str, base):
    model = AutoModelForCausalLM.from_pretrained(base if side == "base" or run.adapter.exists() else run.model)
    return PeftModel.from_pretrained(model, run.adapter) if side == "tuned" and run.adapter.exists() else model


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_each_side_answers_as_generate_with_the_same_seed(run, models, tiny_gpt2, side):
    model, tokenizer = load(run, side, tiny_gpt2).eval(), AutoTokenizer.from_pretrained(tiny_gpt2)
    settings = {"max_new_tokens": 20, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    [expected] = generate_answers(model, tokenizer, [RENDERED], **settings)
    for _ in range(2):  # a second time after the other side has answered
        reply = answer(models, side)
        assert reply.ids == expected.ids
        answer(models, "base" if side == "tuned" else "tuned")
    ids = tokenizer(RENDERED, return_tensors="pt")
    torch.manual_seed(3)
    plain = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 0}
    complete = model.generate(**ids, **plain, pad_token_id=tokenizer.eos_token_id)[0, ids["input_ids"].shape[1] :]
    assert tuple(complete.tolist())[: len(reply.ids)] == reply.ids


def test_an_answer_is_shown_while_it_grows(models):
    updates: list[ModelReply] = []
    complete = answer(models, "tuned", updates=updates)
    assert updates
    assert [reply.tokens for reply in updates] == sorted({reply.tokens for reply in updates})
    assert all(complete.text.startswith(reply.text) for reply in updates)


def test_the_implicit_reward_is_beta_times_the_log_ratio(run, models, tiny_gpt2):
    replies = {side: answer(models, side) for side in ("base", "tuned")}
    rewards = models.find_rewards(QUESTION, replies)
    prompt = models.encode(QUESTION)
    both = {side: load(run, side, tiny_gpt2).eval() for side in ("base", "tuned")}
    for side, reply in replies.items():
        end = [models.sides.tokenizer.eos_token_id] if reply.ended else []
        ids = torch.tensor([[*prompt, *reply.ids, *end]])
        with torch.no_grad():
            logps = {
                name: model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
                for name, model in both.items()
            }
        assert rewards[side] == pytest.approx(0.3 * float((logps["tuned"] - logps["base"]).sum()), abs=1e-4)
    assert models.find_rewards(QUESTION, {"tuned": replies["tuned"]}) is None
    assert models.find_rewards(QUESTION, replies | {"base": ModelReply()}) is None


def test_a_reward_that_is_not_finite_is_none(models):
    replies = {side: answer(models, side) for side in ("base", "tuned")}
    assert models.find_rewards(QUESTION, replies) is not None
    with torch.no_grad():
        next(iter(models.sides.tuned.parameters())).fill_(float("nan"))
    assert models.find_rewards(QUESTION, replies) is None


def test_an_sft_run_answers_without_rewards(tiny_gpt2, tmp_path):
    models = LocalModels(str(make_run(tmp_path, tiny_gpt2, kind="sft").path), None)
    models.load()
    replies = {side: answer(models, side) for side in ("base", "tuned")}
    assert all(reply.ids for reply in replies.values())
    assert models.find_rewards(QUESTION, replies) is None


def test_an_adapter_shares_the_base_and_a_full_model_does_not(run, models, tiny_gpt2):
    weights = {id(parameter): parameter.numel() for parameter in models.sides.tuned.parameters()}
    if models.sides.base is not None:
        weights |= {id(parameter): parameter.numel() for parameter in models.sides.base.parameters()}
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_gpt2).parameters())
    copies = sum(weights.values()) / size
    if run.adapter.exists():
        assert models.sides.base is None
        assert 1 < copies < 1.5
    else:
        assert copies == 2


def test_a_conversation_is_rendered_as_in_training(models, tiny_qwen2):
    messages = [*QUESTION, {"role": "assistant", "content": "Wait."}, {"role": "user", "content": "Why?"}]
    text = models.sides.tokenizer.decode(models.encode(messages), skip_special_tokens=True)
    assert text == "\n\nHuman: How do I bake bread?\n\nAssistant: Wait.\n\nHuman: Why?\n\nAssistant:"
    chat = LocalModels(str(tiny_qwen2), None)
    chat.load()
    assert set(chat.names) == {"tuned"}
    shown = chat.sides.tokenizer.decode(chat.encode(QUESTION))
    assert shown == "<|im_start|>user\nHow do I bake bread?<|im_end|>\n<|im_start|>assistant\n"


def test_a_conversation_longer_than_the_context_is_refused(models):
    long = [{"role": "user", "content": "bread " * 400}]
    with pytest.raises(RefusedError, match="room for 256"):
        answer(models, "tuned", long)


def test_an_answer_ends_when_the_context_is_full(models):
    long = [{"role": "user", "content": "bread " * 60}]
    reply = answer(models, "tuned", long, SamplingSettings(temperature=0.0, max_new_tokens=400))
    assert reply.ended or reply.tokens == 256 - len(models.encode(long))


def test_a_full_model_needs_a_base_with_its_vocabulary(run, tiny_gpt2, tiny_qwen2):
    weights = run.find_weights()
    named = LocalModels(str(weights), str(tiny_gpt2))
    assert named.names == {"base": str(tiny_gpt2), "tuned": str(weights)}
    named.load()
    with pytest.raises(ModelError, match="another vocabulary"):
        LocalModels(str(tiny_gpt2), str(tiny_qwen2)).load()


def test_pickled_weights_are_not_loaded(tiny_gpt2, tmp_path):
    folder = tmp_path / "pickled"
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no weights as safetensors"):
        LocalModels(str(folder), None).load()


def test_code_in_a_models_folder_is_not_run(tiny_gpt2, tmp_path):
    folder = tmp_path / "coded"
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import GPT2Config as Own\n")
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((ModelError, SettingsError)):
        LocalModels(str(folder), None, ["--trust_remote_code"]).load()
    assert not ran.exists()


def test_a_run_without_weights_is_refused(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text(run.run_json.read_text())
    with pytest.raises(RunFolderError, match="holds no weights"):
        LocalModels(str(empty), None)
