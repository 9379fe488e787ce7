"""Real runs of two processes: sharded checkpoints are merged like gathered ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_pairs
from run_to_merge import build_base, find_logits, load_adapted, load_merged
from safetensors.torch import load_file
from test_cli import dpokit
from test_launch import launch
from transformers import AutoModelForCausalLM

from dpokit.errors import RunFolderError
from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.rundir import RunDir

pytestmark = pytest.mark.slow
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"]


@pytest.fixture(scope="module")
def train(tmp_path_factory, plain_tokenizer):
    """Trains a tiny tied Qwen2 for 4 steps, saved at every second; ignores the exit code."""
    folder = tmp_path_factory.mktemp("shards")
    for dtype in ("float32", "bfloat16"):
        base = build_base(folder / dtype, "qwen2", plain_tokenizer, tie_word_embeddings=True)
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    (folder / "data").mkdir()
    write_pairs(folder / "data" / "train.jsonl", 17)
    write_pairs(folder / "data" / "test.jsonl", 7)

    def run(config: Path, name: str, *flags: str, dtype: str = "float32") -> RunDir:
        launch(
            ["--config_file", str(config)],
            *("--model_name_or_path", str(folder / dtype), "--dataset_name", str(folder / "data"), "--use_cpu"),
            *("--output_dir", str(folder / name), "--max_steps", "4", "--max_length", "96", "--bf16", "false"),
            *("--learning_rate", "1e-2", "--warmup_steps", "0", "--eval_steps", "2", "--save_steps", "2"),
            *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
            *("--load_best_model_at_end", "false", *flags),
            recipe="dpo_gpt2",
        )
        return RunDir(folder / name)

    return run


@pytest.mark.parametrize(
    ("config", "kind", "dtype"),
    [
        ("zero2_cpu", "LoRA", "float32"),
        ("zero3_cpu", "full", "bfloat16"),
        ("zero3_cpu", "LoRA", "float32"),
        ("fsdp2_cpu", "full", "float32"),
        ("fsdp2_cpu", "full", "bfloat16"),
    ],
)
def test_the_last_checkpoint_merges_to_the_final_weights(config, kind, dtype, train):
    flags = LORA if kind == "LoRA" else []
    run = train(ROOT / "accelerate_configs" / f"{config}.yaml", f"{config}_{kind}_{dtype}", *flags, dtype=dtype)
    assert run.read_run()["state"] == "finished"
    of_checkpoint = merge_run(run, MergeOptions(checkpoint=4))
    logits = find_logits(load_merged(run))
    run.merged.rename(run.path / "of_checkpoint")
    of_weights = merge_run(run)
    assert (find_logits(load_merged(run)) - logits).abs().max() == 0
    assert (of_checkpoint["weights"], of_weights["weights"]) == (
        "checkpoint-4",
        "model" if kind == "full" else "adapter",
    )
    assert of_checkpoint["largest_drift"] < (1e-4 if dtype == "float32" else 0.5)
    assert of_checkpoint["dtype"] == of_weights["dtype"] == dtype, "that of the base, also where training is in fp32"
    assert of_checkpoint["base"] == of_weights["base"]
    files = [load_file(run.path / name / "model.safetensors") for name in ("of_checkpoint", "merged")]
    assert files[0].keys() <= files[1].keys(), "an FSDP2 run writes a tied head beside its embedding"
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    if kind == "LoRA":
        assert (logits - find_logits(load_adapted(run))).abs().max() < 1e-4


def test_a_merge_gathers_zero_3_shards(train, tmp_path):
    gathering = (ROOT / "accelerate_configs" / "zero3_cpu.yaml").read_text()
    config = tmp_path / "zero3_shards.yaml"
    config.write_text(gathering.replace("zero3_save_16bit_model: true", "zero3_save_16bit_model: false"))
    run = train(config, "ungathered")
    assert run.find_weights() is None, "there is no final model without gathering"
    made = merge_run(run)
    assert made["weights"] == "checkpoint-4"
    whole = train(ROOT / "accelerate_configs" / "zero3_cpu.yaml", "gathered")
    merged, gathered = (load_file(folder / "model.safetensors") for folder in (run.merged, whole.model))
    assert all(torch.equal(merged[name], gathered[name]) for name in gathered)
    assert not list(run.merged.glob("*.py"))
    assert not list(run.merged.glob("*.pt"))


def test_a_damaged_checkpoint_is_skipped_or_refused(train):
    run = train(ROOT / "accelerate_configs" / "fsdp2_cpu.yaml", "damaged")
    run.model.rename(run.path / "elsewhere")
    shard = next((run.path / "checkpoint-4" / "pytorch_model_fsdp_0").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"checkpoint-4 cannot be merged: .*sha256 differs"):
        merge_run(run, MergeOptions(checkpoint=4))
    done = dpokit("merge", str(run.path), "--no-proof", "--json")
    assert done.returncode == 0, done.stderr
    assert "checkpoint-4 is skipped" in done.stderr
    assert "merging its newest whole checkpoint checkpoint-2" in done.stderr
    assert json.loads(done.stdout)["weights"] == "checkpoint-2"


@pytest.mark.cold
def test_plain_transformers_loads_a_merged_folder(train):
    run = train(ROOT / "accelerate_configs" / "ddp_cpu.yaml", "ddp", *LORA)
    merge_run(run)
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "tokenizer, model = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('How do I bake bread?', return_tensors='pt')\n"
        "print(model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] - ids['input_ids'].shape[1])\n"
        "assert not any(name.startswith(('peft', 'dpokit')) for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.merged)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 4
