"""The model card's content, from hand-made run folders."""

import getpass
import json
import re
from pathlib import Path

import pytest
from card_pages import body_of, card_of, check_page, parse, show
from run_folders import add_evaluation, make_run, make_starts, make_steps, v

from dpokit.card.card import write_card
from dpokit.card.citations import LOSS_PAPERS
from dpokit.card.front_matter import check_front_matter
from dpokit.errors import RunFolderError, SettingsError
from dpokit.rundir import RunDir
from dpokit.settings.checks import LOSS_TYPES

LOGGED = ("step", "seconds", "loss", "eval_loss", "rewards/margins", "gpu_power_watts", "gpu_memory_gib")
BARE = '{"state": "running", "generations": []}'


def make_full(folder: Path, *, steps: int = 0, **more) -> Path:
    """A run with every file; without logged steps there are no pictures to draw, which saves a second."""
    records = make_steps(steps, every=5, gpu=True)
    make_run(folder, [{name: record[name] for name in LOGGED if name in record} for record in records], **more)
    add_evaluation(folder)
    (folder / "model").mkdir()
    return folder


def make_adapter(folder: Path, base: str, **more) -> Path:
    make_full(folder, **more)
    (folder / "model").rename(folder / "adapter")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_a_card_has_every_part_and_a_picture_of_each_figure(tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    page = parse(show(card_of(folder, language=["en"], contact="somebody@example.org")))
    check_page(page)
    parts = ["run", "How to use it", "Where it comes from", "Data", "Dropped rows", "Did it get better?", "Samples"]
    parts += ["Curves", "How it was trained", "Settings", "Limits", "Licence", "Contact", "Citations"]
    assert page.headings == parts
    pictures = {value for _, name, value in page.attributes if name == "src"}
    assert {f"figures/{png.name}" for png in (folder / "figures").iterdir()} == pictures
    assert {"figures/loss.png", "figures/margins.png", "figures/gpu_power.png"} <= pictures
    assert all(len(value) > 40 for _, name, value in page.attributes if name == "alt")
    assert "somebody@example.org" in page.text


def test_numbers_in_the_card_are_those_of_the_files(tmp_path):
    folder = make_full(tmp_path / "run", steps=10, best={"step": 15, "metric": "eval_loss", "value": 0.5123})
    text = parse(show(card_of(folder))).text
    pairs = json.loads((folder / "eval" / "pairs.json").read_text())
    assert pairs["verdict"]["text"] in text
    for name in ("accuracy", "margin", "loss", "kl_per_token"):
        result = pairs["tuned"][name]
        assert f"{result['value']:.4f} ({result['low']:.4f}\u00a0to\u00a0{result['high']:.4f})" in text
    rows = [re.sub(r"\s+", " ", row) for row in text.splitlines()]
    data = json.loads((folder / "data.json").read_text())
    for split in ("train", "eval"):
        assert f"{data[split]['rows']:,}" in text
        assert f"{data[split]['kept']:,}" in text
    assert {"different_prompts", "4", "chosen and rejected answer different prompts"} <= set(rows)
    assert {"learning_rate", "5e-07", "command line"} <= set(rows)
    assert "weights kept: of step 15, eval_loss 0.5123" in text
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"last step: {last['step']}" in text
    assert f"{max(json.loads(line)['gpu_memory_gib'] for line in (folder / 'metrics.jsonl').open()):.1f} GiB" in text


def test_the_front_matter_holds_the_numbers_of_the_evaluation(tmp_path):
    folder = make_full(tmp_path / "run")
    (index,) = check_front_matter(card_of(folder, repo_id="me/tuned"))["model-index"]
    tuned = json.loads((folder / "eval" / "pairs.json").read_text())["tuned"]
    (result,) = index["results"]
    assert index["name"] == "tuned"
    assert result["dataset"] == {"type": "Anthropic/hh-rlhf", "name": "Anthropic/hh-rlhf", "split": "test"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    named = {"accuracy": "accuracy", "reward_margin": "margin", "dpo_loss": "loss", "kl_per_token": "kl_per_token"}
    assert values == {kind: tuned[name]["value"] for kind, name in named.items()}


def test_the_same_folder_gives_the_same_card_and_pictures(tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    files = [RunDir(folder).card, *sorted((folder / "figures").iterdir())] if card_of(folder) else []
    before = [file.read_bytes() for file in files]
    card_of(folder)
    assert [file.read_bytes() for file in files] == before


def test_the_card_of_a_supervised_run_does_not_mention_dpo(tmp_path):
    folder = make_full(tmp_path / "run", settings={"kind": "sft", "loss_type": "nll"})
    card = card_of(folder)
    check_page(parse(show(card)))
    assert "fine-tuned (SFT) on the chosen answers of 1,495 preference pairs" in card
    assert "these numbers do not measure its training objective" in card
    assert not re.search("Direct Preference Optimization", card, re.I)
    assert check_front_matter(card)["tags"] == ["sft", "trl", "dpokit"]
    assert check_front_matter(card_of(make_full(tmp_path / "dpo")))["tags"][0] == "dpo"


def test_alarms_are_shown_below_the_verdict(tmp_path):
    text = "eval loss 1.570 is above 0.693, the loss of the untrained base. Fewer epochs help."
    folder = make_full(tmp_path / "run", alarms=[{"kind": "worse_than_base", "step": 40, "text": text}])
    head = body_of(card_of(folder)).partition("## How to use it")[0]
    assert f"> **Alarm** at step 40: {text}" in head


@pytest.mark.parametrize("without", ["eval", "data.json", "metrics.jsonl", "eval/pairs.json", "eval/answers.jsonl"])
def test_a_missing_file_leaves_its_section_out(without, tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    path = folder / without
    path.rename(tmp_path / "away")
    card = card_of(folder)
    check_page(parse(show(card)))
    assert ("dpokit evaluate RUN" in card) == ("eval" in without and "answers" not in without)
    assert ("### Samples" in card) == (without not in ("eval", "eval/answers.jsonl"))
    assert ("## Curves" in card) == (without != "metrics.jsonl")
    assert ("model-index" in check_front_matter(card)) == (without not in ("eval", "eval/pairs.json"))


def test_only_run_json_is_needed(tmp_path):
    (tmp_path / "run.json").write_text(BARE)
    card = card_of(tmp_path)
    check_page(parse(show(card)))
    assert "No step has been logged yet." in card
    assert "Not evaluated: `dpokit evaluate RUN`" in card
    assert "The run had not finished: its state was running." in card
    assert set(check_front_matter(card)) == {"library_name", "license", "pipeline_tag", "tags"}
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", "{", "run.json is damaged"),
        ("data.json", "[]", "data.json is damaged"),
        ("eval/pairs.json", "{", "pairs.json is damaged"),
        ("metrics.jsonl", '{"step": 1}\n{\n{"step": 3}\n', "line 2 is damaged"),
        ("adapter/adapter_config.json", "{", "adapter_config.json is damaged"),
        ("merged/merge.json", "{", "merge.json is damaged"),
    ],
)
def test_a_damaged_file_is_named_and_no_card_is_left(name, content, says, tmp_path):
    folder = make_full(tmp_path / "run")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(RunFolderError, match=re.escape(says)):
        card_of(folder)
    assert not (folder / "README.md").exists()
    assert not (folder / "figures").exists()


def test_cards_of_adapter_full_run_and_merged_model_differ(tmp_path):
    settings = {"use_peft": True, "lora_r": 16}
    adapter = make_adapter(tmp_path / "adapter_run", "gpt2", settings=settings)
    card = card_of(adapter, repo_id="me/tuned")
    data = check_front_matter(card)
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("gpt2", "adapter", "peft")
    assert 'base, name = "gpt2", "me/tuned"' in card
    assert "PeftModel.from_pretrained(model, name)" in card
    full = check_front_matter(card_of(make_full(tmp_path / "full")))
    assert (full["base_model_relation"], full["library_name"]) == ("finetune", "transformers")
    (adapter / "merged").mkdir()
    merge = {
        "mean_drift": 1.5e-6,
        "largest_drift": 8.1e-5,
        "accuracy_before": 0.68,
        "accuracy_after": 0.68,
        "pairs": 64,
    }
    (adapter / "merged" / "merge.json").write_text(json.dumps(merge | {"dtype": "bfloat16"}))
    merged = card_of(adapter, repo_id="me/tuned")
    assert check_front_matter(merged)["base_model_relation"] == "finetune"
    assert "PeftModel" not in merged
    text = parse(show(merged)).text
    assert all(part in text for part in ("What merging changed", "1.5e-06", "8.1e-05", "bfloat16"))
    both = card_of(adapter, weights="both")
    assert "subfolder='adapter'" in both
    assert check_front_matter(card_of(adapter, weights="adapter"))["base_model_relation"] == "adapter"


@pytest.mark.parametrize(("weights", "says"), [("adapter", "has no adapter/"), ("both", "has no adapter/")])
def test_missing_weights_are_refused(weights, says, tmp_path):
    with pytest.raises(SettingsError, match=says):
        card_of(make_full(tmp_path / "run"), weights=weights)
    adapter = make_adapter(tmp_path / "lora", "gpt2")
    with pytest.raises(SettingsError, match="dpokit merge"):
        card_of(adapter, weights="model")


def test_a_further_trained_adapter_is_named_beside_its_base(tmp_path):
    folder = make_adapter(
        tmp_path / "run", "org/base", settings={"model_name_or_path": "/data/old_lora"}, local=["model_name_or_path"]
    )
    card = card_of(folder)
    assert check_front_matter(card)["base_model"] == "org/base"
    assert "adapter that was trained further: old_lora (local, not on the Hub)" in card


def test_a_local_base_has_no_path_and_no_front_matter(tmp_path):
    base = tmp_path / "bases" / "tiny"
    settings = {"model_name_or_path": str(base), "dataset_name": str(tmp_path / "pairs.jsonl")}
    local = ["model_name_or_path", "dataset_name"]
    folder = make_adapter(tmp_path / "run", str(base), settings=settings, local=local)
    card = card_of(folder)
    data = check_front_matter(card)
    assert not {"base_model", "base_model_relation", "datasets"} & set(data)
    assert "base model: tiny (local, not on the Hub)" in card
    assert "trained on: pairs.jsonl (local, not on the Hub)" in card
    assert "Replace BASE by the model" in card
    data = check_front_matter(card_of(folder, base_model="org/tiny"))
    assert (data["base_model"], data["base_model_relation"]) == ("org/tiny", "adapter")


def test_a_local_folder_named_like_a_hub_id_stays_local(tmp_path):
    local = ["model_name_or_path", "dataset_name"]
    settings = {"model_name_or_path": "models/tiny", "dataset_name": "data/pairs"}
    data = check_front_matter(card_of(make_full(tmp_path / "run", settings=settings, local=local)))
    assert not {"base_model", "datasets"} & set(data)
    data = check_front_matter(card_of(make_full(tmp_path / "other", settings=settings, local=[])))
    assert (data["base_model"], data["datasets"]) == ("models/tiny", ["data/pairs"])


# settings of the data, the local ones, the name of the held-out pairs, the card's sources, those of the results
MIXTURES: dict[str, tuple[dict, list[str], str, list[str], str]] = {
    "files with a comma": (
        {"dataset_name": "/d/a.jsonl,/d/big.jsonl"},
        ["/d/a.jsonl", "/d/big.jsonl"],
        "10.00% of the training pairs",
        ["a.jsonl (local, not on the Hub)", "big.jsonl (local, not on the Hub)"],
        "a.jsonl and big.jsonl",
    ),
    "files of one source": (
        {"datasets": [{"path": "json", "data_files": ["/d/a.jsonl", "/d/big.jsonl"]}]},
        ["/d/a.jsonl /d/big.jsonl"],
        "/d/a.jsonl /d/big.jsonl, split test",
        ["a.jsonl, big.jsonl (local, not on the Hub)"],
        "a.jsonl, big.jsonl",
    ),
    "configurations": (
        {"datasets": [{"path": "me/x", "name": "en"}, {"path": "me/x", "name": "de"}, {"path": "me/y"}]},
        [],
        "me/x (en) + me/x (de)",
        ["me/x", "me/y"],
        "me/x",
    ),
    "a single configuration": (
        {"datasets": [{"path": "me/x", "name": "en"}]},
        [],
        "me/x (en), split test",
        ["me/x"],
        "me/x",
    ),
    "a file of the Hub": (
        {"datasets": [{"path": "me/x", "data_files": "data/a.jsonl"}]},
        [],
        "me/x/data/a.jsonl, split test",
        ["me/x"],
        "me/x",
    ),
    "other data": (
        {"dataset_name": "/d/a.jsonl"},
        ["dataset_name"],
        "/d/b.jsonl + /d/c.jsonl",
        ["a.jsonl (local, not on the Hub)"],
        "b.jsonl and c.jsonl",
    ),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_card_names_every_source_of_a_mixture(case, tmp_path):
    settings, local, held_out, sources, measured = MIXTURES[case]
    folder = make_full(tmp_path / "run", settings={"dataset_name": None, **settings}, local=local)
    file = folder / "eval" / "pairs.json"
    pairs = json.loads(file.read_text())
    file.write_text(json.dumps(pairs | {"data": pairs["data"] | {"name": held_out, "own": case != "other data"}}))
    text = parse(show(card_of(folder))).text
    for source in sources:
        assert f"trained on: {source}" in text
    assert f"pairs of {measured}; other kinds" in text
    assert "/d/" not in text


def test_a_card_holds_nothing_personal(tmp_path):
    """Local paths, the host and the user's name, in whatever file of the run."""
    secret = "/home/quincy/wonder/land"
    settings = {
        "model_name_or_path": f"{secret}/base",
        "dataset_name": f"{secret}/pairs.jsonl",
        "output_dir": "../quincy/mine",
        "resume_from_checkpoint": "~quincy/mine/checkpoint-5",
        "chat_template_path": "quincy/chat.jinja",
        "deepspeed": {"offload": {"path": f"{secret}/nvme"}},
        "run_name": "quincy's try",
        "hub_model_id": "quincy/tuned",
        "project": "quincy",
        "hub_token": "***",
    }
    folder = make_full(
        tmp_path / "run",
        steps=10,
        settings=settings,
        why=f"no space in {secret}/mine",
        alarms=[{"step": 1, "text": f"look at file://{secret}/log.txt"}],
        generations=[start | {"host": "quincys-desk"} for start in make_starts(4)],
    )
    data = json.loads((folder / "data.json").read_text())
    data["train"]["source"] = f"{secret}/pairs.jsonl, split train"
    data["findings"] = [f"12 rows of {secret}/pairs.jsonl are strange"]
    (folder / "data.json").write_text(json.dumps(data))
    pairs = json.loads((folder / "eval" / "pairs.json").read_text())
    pairs["data"]["name"] = f"{secret}/held_out.jsonl, split train"
    pairs["base"]["model"] = pairs["tuned"]["model"] = f"{secret}/base"
    pairs["verdict"]["text"] = f"Better than {secret}/base."
    (folder / "eval" / "pairs.json").write_text(json.dumps(pairs))
    card = card_of(folder)
    pictures = b"".join(path.read_bytes() for path in (folder / "figures").iterdir())
    for word in ("quincy", "wonder", "/home", str(tmp_path), str(Path.home()) + "/"):
        assert word not in card, word
        assert word.encode() not in pictures
    for name in ("base", "pairs.jsonl", "held_out.jsonl", "mine", "checkpoint-5", "nvme", "log.txt"):
        assert name in card
    if getpass.getuser() != "root":
        assert getpass.getuser() not in card


def test_a_path_in_a_sample_is_not_shortened(tmp_path):
    folder = make_full(tmp_path / "run")
    add_evaluation(folder, text="cat /usr/share/dict/words")
    assert "cat /usr/share/dict/words" in parse(show(card_of(folder))).text


def test_long_samples_are_shortened_and_only_five_are_shown(tmp_path):
    folder = make_full(tmp_path / "run")
    add_evaluation(folder, prompt="a" * 900 + "zenith", text="incipit " + "b " * 5000)
    line = (folder / "eval" / "answers.jsonl").read_text().splitlines()[0]
    (folder / "eval" / "answers.jsonl").write_text(f"{line}\n" * 12)
    card = card_of(folder)
    assert "The first 5 of 12" in card
    text = parse(show(card)).text
    assert (text.count("zenith"), text.count("incipit"), text.count("letters]")) == (5, 10, 10)
    assert len(card) < 40_000


def test_a_foreign_card_is_not_overwritten(tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    (folder / "README.md").write_text("# Mine\n\nMade with love, and with dpokit card in mind.\n")
    with pytest.raises(RunFolderError, match="was not written by dpokit card"):
        card_of(folder)
    assert (folder / "README.md").read_text().startswith("# Mine")
    assert RunDir(folder).card not in RunDir(folder).own_files()
    (folder / "README.md").unlink()
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "loss.png").write_bytes(b"a picture of mine")
    with pytest.raises(RunFolderError, match=r"loss\.png exists"):
        card_of(folder)
    assert not (folder / "README.md").exists()


def test_an_edited_card_is_not_overwritten(tmp_path):
    folder = make_full(tmp_path / "run")
    card_of(folder)
    card_of(folder, license="apache-2.0")  # replaces the unedited card
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nThank you, Ada.\n")
    with pytest.raises(RunFolderError, match="was edited since"):
        card_of(folder)
    assert path.read_text().endswith("Thank you, Ada.\n")


def test_an_outdated_picture_is_deleted_and_others_stay(tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    card_of(folder)
    (folder / "figures" / "mine.png").write_bytes(b"a picture of mine")
    make_run(folder, [{"step": 1, "seconds": 1, "loss": 0.7}])
    card_of(folder)
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {"mine.png", "loss.png"} <= names
    assert "gpu_power.png" not in names


def test_clearing_a_run_deletes_its_card_but_no_other_files(tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    card_of(folder)
    (folder / "figures" / "mine.png").write_bytes(b"a picture of mine")
    RunDir(folder).clear()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mine.png"]


def test_a_disk_error_is_one_message(tmp_path):
    folder = make_full(tmp_path / "run", steps=10)
    (folder / "figures").write_text("a file of somebody")
    with pytest.raises(RunFolderError, match="file is where a folder is needed"):
        card_of(folder)
    assert not (folder / "README.md").exists()


def test_limits_name_the_longer_answer_and_cut_prompts(tmp_path):
    folder = make_full(tmp_path / "run")
    pairs = json.loads((folder / "eval" / "pairs.json").read_text())
    longer = "does not show that its reward accuracy is above that of always choosing the longer answer"
    assert longer not in card_of(folder)
    (folder / "eval" / "pairs.json").write_text(json.dumps(pairs | {"always_longer": v(0.67)}))
    assert longer in card_of(folder)
    assert "the length limits cut the start of the prompt in 538" in card_of(folder)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, {"rafailov2023direct", "bai2022training", "vonwerra2020trl"}),
        (
            {"loss_type": "ipo", "dataset_name": "me/pairs"},
            {"rafailov2023direct", "azar2023general", "vonwerra2020trl"},
        ),
        (
            {"loss_type": ["aot", "sft"], "dataset_name": "me/pairs", "use_weighting": True},
            {"rafailov2023direct", "melnyk2024distributional", "zhou2024wpo", "vonwerra2020trl"},
        ),
    ],
)
def test_the_papers_of_loss_and_data_are_cited(settings, keys, tmp_path):
    card = card_of(make_full(tmp_path / "run", settings=settings))
    assert set(re.findall(r"^@\w+\{(\w+),", card, re.M)) == keys


def test_every_loss_except_sigmoid_and_sft_has_a_paper():
    assert set(LOSS_TYPES) - set(LOSS_PAPERS) == {"sigmoid", "sft"}


@pytest.mark.parametrize(
    ("files", "prompt_format", "says"),
    [
        ({"chat_template.jinja": ""}, "transcript", "apply_chat_template"),
        ({"tokenizer_config.json": '{"chat_template": "x"}'}, "transcript", "apply_chat_template"),
        ({"tokenizer_config.json": "{}"}, "transcript", r'"\n\nHuman: How do I bake bread?\n\nAssistant:"'),
        ({}, "raw", 'prompt = "How do I bake bread?"'),
    ],
)
def test_the_example_prompt_has_the_format_of_the_training(files, prompt_format, says, tmp_path):
    folder = make_full(tmp_path / "run", settings={"prompt_format": prompt_format})
    for name, content in files.items():
        (folder / "model" / name).write_text(content)
    card = card_of(folder, repo_id="me/tuned")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert says in code
    assert 'name = "me/tuned"' in code
    compile(code, "card", "exec")


def test_the_licence_is_shown_with_its_link(tmp_path):
    folder = make_full(tmp_path / "run")
    card = card_of(
        folder, license="other", license_name="house-1.0", license_link="https://example.org/house?a=1&b=_2_"
    )
    assert ("a", "href", "https://example.org/house?a=1&b=_2_") in parse(show(card)).attributes
    data = check_front_matter(card)
    assert (data["license"], data["license_name"]) == ("other", "house-1.0")


def test_a_folder_without_a_run_is_one_message(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no run\.json"):
        write_card(RunDir(tmp_path), license="mit")
