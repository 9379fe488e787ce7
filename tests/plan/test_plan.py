"""The whole plan: the recommendation, the advice if nothing fits, and the prediction against a real step."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, write_pairs
from planning import build_request, write_llama_8b

from dpokit.errors import DpokitError, MachineError, ModelError, SettingsError
from dpokit.plan.check import check_plan, raise_failure
from dpokit.plan.plan import build_plan
from dpokit.plan.table import print_plan


@pytest.fixture
def plan(tmp_path, tiny_gpt2, pairs_file):
    """Plans dpo_gpt2 on a tiny model and 40 pairs."""

    def build(gpus: str | None, *flags: str):
        paths = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--eval_fraction", "0.1"]
        return build_plan(build_request(tmp_path, "dpo_gpt2", gpus, *paths, "--max_length", "64", *flags))

    return build


def test_the_simplest_fitting_placement_is_recommended(plan):
    planned = plan("4x80")
    assert planned.recommended.placement == "DDP"
    assert planned.command.startswith("accelerate launch --config_file accelerate_configs/ddp.yaml ")
    assert f"--max_length {64}" in planned.command
    assert plan("80").command.startswith(f"accelerate launch {planned.request.recipe} ")


def test_the_config_of_each_placement_exists(plan):
    for estimate in plan("2x80").record()["placements"]:
        assert (ROOT / estimate["config"]).is_file()


def test_a_plan_that_does_not_fit_names_changes(plan, capsys):
    planned = plan("0.5")
    assert planned.recommended is None
    assert planned.command is None
    print_plan(planned, None)
    text = capsys.readouterr().out
    assert "nothing fits" in text
    assert "--gradient_checkpointing true" in text
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 32" in text
    assert "accelerate launch" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_screen_and_names_its_sources(plan, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    planned = plan("8x80")
    print_plan(planned, None)
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("placement")) :]
    assert all(len(line) <= width for line in table if "accelerate launch" not in line)
    assert table[0].split()[1:8] == ["weights", "grads", "optim.", "ref.", "activ.", "logits", "other"]
    sources = next(line for line in table if line.startswith("known by"))
    assert sources.split()[2:] == ["arith.", "arith.", "arith.", "arith.", "traced", "arith.", "assum."]


def test_the_parts_in_json_add_up_to_the_total(plan):
    record = plan("8x80").record()
    assert json.loads(json.dumps(record)) == record
    assert record["steps"]["how"] == "exact"
    for estimate in record["placements"]:
        assert sum(estimate["device_gib"].values()) == pytest.approx(estimate["total_gib"], abs=0.005)
        assert estimate["device_gib"].keys() == record["sources"].keys()


def test_a_model_without_a_config_is_one_error(plan, tmp_path):
    with pytest.raises(ModelError, match="no config could be loaded"):
        plan("80", "--model_name_or_path", str(tmp_path))


def test_more_tokens_than_positions_are_refused_as_in_a_run(plan):
    with pytest.raises(SettingsError, match="only 256 positions"):
        plan("80", "--max_length", "1000")


def test_an_adapter_is_planned_with_its_base(plan, tiny_gpt2, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LoraConfig(r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    planned = plan("80", "--model_name_or_path", str(tmp_path / "adapter"), "--use_peft")
    assert planned.blueprint.adapter_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_8b_in_4_bit_is_planned_for_a_24_gb_gpu(tmp_path, plain_tokenizer):
    pytest.importorskip("bitsandbytes")
    folder = write_llama_8b(tmp_path / "llama", plain_tokenizer)
    planned = build_plan(build_request(tmp_path, "dpo_qlora", "24", "--model_name_or_path", str(folder)))
    assert planned.recommended.placement == "one device"
    assert 5.0 < planned.estimates[0].parts["weights"] / 2**30 < 5.6
    assert planned.estimates[0].parts["optimizer"] < 2**27


def test_a_check_of_devices_elsewhere_is_refused(plan):
    with pytest.raises(SettingsError, match="--check measures on this machine"):
        check_plan(plan("8x80"))


@pytest.mark.parametrize(
    ("code", "text"),
    [(-9, ""), (137, "Killed"), (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory"),
     (1, "torch.OutOfMemoryError: CUDA out of memory.")],
)  # fmt: skip
def test_a_check_out_of_memory_ends_with_one_message(code, text):
    done = subprocess.CompletedProcess([], code, "", text)
    with pytest.raises(MachineError, match=r"ran out of memory \(the plan says 7.5 GiB\)"):
        raise_failure(done, {}, predicted_gib=7.5)


def test_an_error_of_the_check_is_raised():
    done = subprocess.CompletedProcess([], 2, "", "")
    with pytest.raises(DpokitError, match="seen"):
        raise_failure(done, {"seen": "seen", "expected": "e", "do": "d"}, predicted_gib=1.0)
    with pytest.raises(RuntimeError, match="Traceback of something else"):
        raise_failure(subprocess.CompletedProcess([], 1, "", "Traceback of something else"), {}, predicted_gib=1.0)


def test_a_check_trains_and_leaves_no_files(plan, tmp_path):
    planned = plan(None, "--use_cpu", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2")
    result = check_plan(planned)
    assert result["measured_gib"] > 0.2
    assert result["difference_percent"] == pytest.approx(
        100 * (result["predicted_gib"] / result["measured_gib"] - 1), abs=0.5
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def gpt2_124m(tmp_path_factory, plain_tokenizer):
    """GPT-2 124M with random weights, and the real tokenizer if the shared folder has it."""
    import torch
    from conftest import SHARED
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2_124m")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    real = SHARED / "data" / "gpt2-tokenizer"
    (AutoTokenizer.from_pretrained(real) if real.is_dir() else plain_tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keeps_freed_memory"),
    [([], False), ([], True), (["--use_peft"], True)],
    ids=["full", "full, keeps freed memory", "LoRA, keeps freed memory"],
)
@pytest.mark.cold
@pytest.mark.long
def test_the_prediction_is_within_15_percent_of_a_real_step(method, keeps_freed_memory, gpt2_124m, tmp_path):
    """In a separate process, because the prediction includes the memory of the process that plans."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows[:8]:
        row["prompt"] = row["prompt"].replace("Human:", "Human:" + " Please help me with my garden." * 200, 1)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = ["--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--max_length", "512"]
    paths = ["--model_name_or_path", str(gpt2_124m), "--dataset_name", str(pairs), "--eval_fraction", "0.1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if keeps_freed_memory:
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
    recipe = str(ROOT / "recipes" / "dpo_gpt2.py")
    done = subprocess.run(
        [sys.executable, "-m", "dpokit.cli", "plan", recipe, *paths, *shape, *method, "--use_cpu", "--check", "--json"],
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment | {"PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    assert record["worst_micro_batch"]["row_tokens"] == 512
    assert abs(record["check"]["difference_percent"]) <= 15, record["check"]
