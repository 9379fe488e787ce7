"""Sampled answers of base and tuned: the same for any number of processes, statistics by hand, files on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import find_free_port, write_pairs
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.data.prepare import prepare_data
from dpokit.errors import DataError, ModelError, RunFolderError, SettingsError
from dpokit.evaluate.answers import Prompt, Sampling, build_prompts, write_answers
from dpokit.model.generate import Answer, count_answers, generate_answers
from dpokit.settings.flags import DataArguments

PROMPTS = [Prompt(f"\n\nHuman: How do I bake {'good ' * i}bread?\n\nAssistant:", " Mix flour.") for i in range(5)]
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=3, batch_size=2)


@pytest.fixture
def tokenizer(tiny_gpt2):
    return AutoTokenizer.from_pretrained(tiny_gpt2)


@pytest.fixture
def base(tiny_gpt2):
    return AutoModelForCausalLM.from_pretrained(tiny_gpt2)


@pytest.fixture
def tuned(tiny_gpt2):
    """The base with other weights, like the result of a run that trained all weights."""
    return change(AutoModelForCausalLM.from_pretrained(tiny_gpt2))


@pytest.fixture
def adapted(tiny_gpt2):
    """The base with an adapter that changes it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    return change(get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"])), "lora_B")


def change(model, part: str = ""):
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if part in name:
            torch.nn.init.normal_(weight, std=2.0)
    return model


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_each_prompt_has_both_models_sampled_answers(base, tuned, tokenizer, tmp_path):
    write_answers(tmp_path, PROMPTS, base=base, tuned=tuned, tokenizer=tokenizer, sampling=SAMPLING)
    records = read(tmp_path)
    assert [(record["prompt"], record["chosen"]) for record in records] == [(p.text, p.chosen) for p in PROMPTS]
    for name, model in (("base", base), ("tuned", tuned)):
        for number, batch in enumerate((PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:])):
            sampled = generate_answers(
                model, tokenizer, [p.text for p in batch], max_new_tokens=12, seed=3 + number, batch_size=2
            )
            expected = [{"text": a.text, "tokens": len(a.ids), "ended": a.ended} for a in sampled]
            assert [record[name] for record in records[2 * number :][:2]] == expected
    assert all(record["base"]["text"] != record["tuned"]["text"] for record in records)


def test_answers_json_holds_settings_and_statistics(base, tuned, tokenizer, tmp_path):
    outcome = write_answers(tmp_path, PROMPTS, base=base, tuned=tuned, tokenizer=tokenizer, sampling=SAMPLING)
    assert json.loads((tmp_path / "answers.json").read_text()) == outcome
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3, "batch_size": 2}
    assert outcome["settings"] == settings | {"prompts": 5, "cut_prompts": 0}
    for name in ("base", "tuned"):
        lengths = [record[name]["tokens"] for record in read(tmp_path)]
        assert outcome[name]["mean_tokens"] == sum(lengths) / 5
        assert {type(value) for value in outcome[name].values()} == {float}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.json", "answers.jsonl"]


def test_an_adapters_base_is_the_model_without_the_adapter(base, adapted, tokenizer, tmp_path):
    (tmp_path / "base").mkdir()
    write_answers(tmp_path, PROMPTS, base=None, tuned=adapted, tokenizer=tokenizer, sampling=SAMPLING)
    write_answers(tmp_path / "base", PROMPTS, base=base, tuned=adapted, tokenizer=tokenizer, sampling=SAMPLING)
    assert read(tmp_path) == read(tmp_path / "base")
    assert [record["base"]["text"] for record in read(tmp_path)] != [r["tuned"]["text"] for r in read(tmp_path)]


def test_a_full_model_without_a_base_is_refused(tuned, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="no adapter to switch off"):
        write_answers(tmp_path, PROMPTS, base=None, tuned=tuned, tokenizer=tokenizer, sampling=SAMPLING)


def test_a_long_prompt_keeps_its_end_and_is_counted(base, tokenizer, tmp_path):
    long = Prompt("\n\nHuman: The sky is blue." + PROMPTS[0].text * 40)
    greedy = Sampling(max_new_tokens=56, temperature=0.0, batch_size=2)
    outcome = write_answers(tmp_path, [long, PROMPTS[0]], base=base, tuned=base, tokenizer=tokenizer, sampling=greedy)
    assert outcome["settings"]["cut_prompts"] == 1
    end = tokenizer(long.text)["input_ids"][-200:]  # the answer takes 56 of 256 positions
    [expected] = generate_answers(base, tokenizer, [end], max_new_tokens=56, temperature=0.0)
    assert read(tmp_path)[0]["base"]["text"] == expected.text


def test_a_cut_prompt_keeps_its_bos(tuned, tokenizer, tmp_path):
    bos, word = tokenizer.bos_token_id, tokenizer("bread")["input_ids"][0]
    greedy = Sampling(max_new_tokens=250, temperature=0.0)
    prompt = Prompt("", ids=(bos, *[word] * 20))
    write_answers(tmp_path, [prompt], base=tuned, tuned=tuned, tokenizer=tokenizer, sampling=greedy)
    [expected] = generate_answers(tuned, tokenizer, [[bos, *[word] * 5]], max_new_tokens=250, temperature=0.0)
    assert read(tmp_path)[0]["tuned"]["text"] == expected.text


def test_an_answer_limit_that_leaves_no_positions_is_refused(base, tokenizer, tmp_path):
    with pytest.raises(SettingsError, match="max_new_tokens is 256, but the model has only 256 positions"):
        write_answers(tmp_path, PROMPTS, base=base, tuned=base, tokenizer=tokenizer, sampling=Sampling(256))


def test_no_prompts_are_an_error_that_writes_no_file(base, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no prompts"):
        write_answers(tmp_path, [], base=base, tuned=base, tokenizer=tokenizer, sampling=SAMPLING)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_a_run_folder_error(base, tokenizer, tmp_path):
    with pytest.raises(RunFolderError, match="folder cannot be created"):
        write_answers(tmp_path / "no", PROMPTS, base=base, tuned=base, tokenizer=tokenizer, sampling=SAMPLING)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"batch_size": 0}], ids=str
)
def test_an_invalid_sampling_setting_is_refused_by_name(wrong):
    [name] = wrong
    with pytest.raises(SettingsError, match=f"{name} is {wrong[name]}"):
        Sampling(**wrong)


def test_prompts_of_a_split_are_distinct_with_training_tokens(tokenizer):
    first, second, chosen, other = [[5, 6, 7], [8, 9], [10, 11, tokenizer.eos_token_id], [12]]
    split = Dataset.from_dict(
        {"prompt_ids": [first, second, first, [13]], "chosen_ids": [chosen, other, other, other]}
        | {"rejected_ids": [other] * 4, "row": range(4)}
    )
    prompts = build_prompts(split, tokenizer, limit=2)
    assert [prompt.ids for prompt in prompts] == [(5, 6, 7), (8, 9)]
    assert prompts[0].text == tokenizer.decode(first)
    assert prompts[0].chosen == tokenizer.decode([10, 11]), "without its end token"
    assert len(build_prompts(split, tokenizer)) == 3
    assert build_prompts(split, tokenizer, limit=0) == []


def test_a_prompt_is_answered_if_the_assistant_is_next(tokenizer):
    """The chosen answers: a whole one, one that a user's turn follows, and one that begins with a user's turn."""
    masks = [[], [1, 1, 0, 0, 1], [0, 1]]
    rows = [
        {"prompt_ids": [5, number], "chosen_ids": [10, 11, 12, 13, 14][: len(mask) or 3], "chosen_mask": mask}
        for number, mask in enumerate(masks)
    ]
    prompts = build_prompts(Dataset.from_list(rows), tokenizer)
    assert [(prompt.ids, prompt.chosen) for prompt in prompts] == [
        ((5, 0), tokenizer.decode([10, 11, 12])),
        ((5, 1), tokenizer.decode([10, 11])),
    ]


def test_prompts_of_prepared_pairs_equal_the_rows(tokenizer, tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 4)
    data = prepare_data(DataArguments(dataset_name=str(path)), tokenizer, max_length=None, with_eval=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = build_prompts(data.train, tokenizer)
    assert [(p.text, p.chosen) for p in prompts] == [(row["prompt"], row["chosen"]) for row in rows]


def test_statistics_equal_a_count_by_hand():
    # 1 2 3 4 | 2 3 4 1 | 3 4 1 2 | 4 1 2 3 | 1 2 3 4: the fifth 4-gram repeats the first.
    loop = Answer("", (1, 2, 3, 4, 1, 2, 3, 4), ended=False)
    short = Answer("", (1, 5), ended=True)
    assert count_answers([loop, short]) == pytest.approx(
        {
            "mean_tokens": 5.0,
            "repetition": (1 / 5 + 0) / 2,
            "distinct_1": 5 / 10,
            "distinct_2": 5 / 8,  # 12 23 34 41 of 7, and 15 of 1
            "ended": 0.5,
        }
    )


def test_a_loop_of_one_token_repeats_all_but_its_first_4_gram():
    assert count_answers([Answer("", (7,) * 13, ended=False)])["repetition"] == pytest.approx(9 / 10)


def test_empty_answers_have_statistics():
    expected = {"mean_tokens": 0.0, "repetition": 0.0, "distinct_1": 0.0, "distinct_2": 0.0, "ended": 1.0}
    assert count_answers([Answer("", (), ended=True)] * 2) == expected


# The script of a rank that answers the prompts in a file; it prints the number of ranks and the outcome, or an error.
ANSWERER = """
import json, sys
from accelerate import PartialState
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from dpokit.errors import DpokitError
from dpokit.evaluate.answers import Prompt, Sampling, write_answers
from dpokit.distributed.processes import join_world

base, tuned, prompts, folder = map(Path, sys.argv[1:])
join_world(60, on_cpu=True)
state = PartialState(cpu=True)
try:
    outcome = write_answers(
        folder,
        [Prompt(text) for text in json.loads(prompts.read_text())],
        base=AutoModelForCausalLM.from_pretrained(base),
        tuned=AutoModelForCausalLM.from_pretrained(tuned),
        tokenizer=AutoTokenizer.from_pretrained(base),
        sampling=Sampling(max_new_tokens=12, temperature=1.0, seed=3, batch_size=2),
    )
    print(state.num_processes, json.dumps(outcome), flush=True)
except DpokitError as error:
    print(type(error).__name__, flush=True)
"""


@pytest.fixture
def answer(tiny_gpt2, tuned, tmp_path):
    """Runs the script on a number of ranks; returns each rank's output."""
    script, prompts, weights = tmp_path / "answerer.py", tmp_path / "prompts.json", tmp_path / "tuned"
    script.write_text(ANSWERER)
    prompts.write_text(json.dumps([prompt.text for prompt in PROMPTS]))
    tuned.save_pretrained(weights)

    def run(ranks: int, folder: Path) -> list[str]:
        command = [sys.executable, script, tiny_gpt2, weights, prompts, folder]
        world = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port()}
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | {name: str(value) for name, value in (world | {"RANK": r, "LOCAL_RANK": r}).items()},
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(ranks)
        ]
        try:
            return [process.communicate(timeout=120)[0].strip() for process in processes]
        finally:
            for process in processes:
                process.kill()

    return run


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one_process(answer, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
    [output] = answer(1, alone)
    assert output.startswith("1 {")
    assert answer(2, both) == ["2" + output[1:]] * 2, "every rank has the outcome"
    for name in ("answers.jsonl", "answers.json"):
        assert (alone / name).read_text() == (both / name).read_text()
    assert len(read(both)) == 5


@pytest.mark.slow
def test_a_write_error_of_one_process_is_raised_on_all(answer, tmp_path):
    assert answer(2, tmp_path / "no") == ["RunFolderError"] * 2
