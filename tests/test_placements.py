"""Every placement trains, evaluates, saves and reloads, with the same losses as one process.

Prints the table of docs/placements.md:

    bash launch/test.sh --slow tests/test_placements.py

The CPU columns are two processes over gloo; the GPU columns need a GPU and use all that are visible.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_pairs
from placement_table import PLACEMENTS as ROWS
from test_launch import launch, records

from dpokit.plan.placements import CONFIGS

PLACEMENTS = ["ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]
CPU_TWINS = ["ddp_cpu", "zero2_cpu", "zero3_cpu", "zero3_offload", "fsdp2_cpu"]
# Recipe and flags; QLoRA is the unchanged recipe: 4-bit layers, 16-bit adapters, bitsandbytes' 8-bit AdamW.
KINDS = {
    "full": ("dpo_gpt2", []),
    "LoRA": (
        "dpo_gpt2",
        ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--gradient_checkpointing", "true"],
    ),
    "QLoRA": ("dpo_qlora", ["--dataset_train_split", "train", "--dataset_test_split", "test"]),
}
# With 16-bit adapters and 4-bit products, another order of sums changes the rounding; with fp32 hardly.
TOLERANCE = {"full": 2e-4, "LoRA": 2e-4, "QLoRA": 1e-2}
NAMES = {
    "single_gpu": "one device",
    "ddp": "DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 + CPU offload",
    "fsdp2": "FSDP2",
}
SHOWN = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "eval_loss"}
GPUS = torch.cuda.device_count()


def build_tiny_llama(folder: Path, tokenizer) -> Path:
    """A random Llama of 2 layers; its head is not tied to its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**size, **heads, **end)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """17 and 7 pairs: in an epoch's last step and in the evaluation, one rank has no pair."""
    folder.mkdir()
    write_pairs(folder / "train.jsonl", 17)
    write_pairs(folder / "test.jsonl", 7)
    return folder


def train_placement(
    folder: Path,
    model: Path,
    data: Path,
    config: str,
    kind: str,
    per_device: int,
    *flags: str,
    launcher: tuple[str, ...] = (),
) -> None:
    """Trains with a config, a kind and a number of pairs per device."""
    recipe, kind_flags = KINDS[kind]
    result = launch(
        ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), *launcher],
        *("--model_name_or_path", str(model), "--dataset_name", str(data), *kind_flags, *flags),
        *("--output_dir", str(folder), "--num_train_epochs", "2", "--max_length", "96"),
        *("--learning_rate", "1e-3", "--warmup_steps", "0", "--logging_steps", "1"),
        *("--loss_type", "sigmoid", "--loss_weights", "1.0", "--eval_steps", "2", "--save_steps", "2"),
        *("--per_device_train_batch_size", str(per_device), "--per_device_eval_batch_size", "2"),
        *("--gradient_accumulation_steps", "2", "--bf16", "false"),
        recipe=recipe,
    )
    print(result.stderr[-5000:])


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory, plain_tokenizer) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny_llama", plain_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pairs") / "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, data):
    """Trains with a config, a kind and a number of pairs per device; equal runs are trained once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def train(config: str, kind: str, per_device: int, *flags: str, launcher: tuple[str, ...] = ()) -> Path:
        name = "_".join([config, kind, str(per_device), *flags])
        if name not in done:
            done[name] = folder / name
            train_placement(done[name], tiny_llama, data, config, kind, per_device, *flags, launcher=launcher)
        return done[name]

    return train


def check_same_run(folder: Path, one: Path, kind: str, placement: str) -> None:
    """Asserts the placement in force, every logged loss, and the final weights read back from the disk."""
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["placement"] == placement.removesuffix(" + CPU offload")
    assert record["answers_of_base"]["mean_tokens"] > 0
    lines = list(zip(records(folder), records(one), strict=True))
    assert len(lines) >= 2
    assert [line["step"] for line, _ in lines] == list(range(1, len(lines) + 1))
    for line, expected in lines:
        assert line.keys() == expected.keys()
        for name in SHOWN & expected.keys():
            assert line[name] == pytest.approx(expected[name], rel=TOLERANCE[kind], abs=TOLERANCE[kind]), name
    weights, expected_weights = (reload(path, kind) for path in (folder, one))
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert weight.numel() > 0
        # AdamW moves a weight by up to the learning rate per step, whatever its gradient's size.
        assert (weight - expected_weights[name]).abs().max() < (1e-4 if kind != "QLoRA" else 6e-3), name


def reload(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    if kind == "full":
        return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    settings = json.loads((folder / "run.json").read_text())["settings"]
    base = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]["value"])
    adapter = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder / "adapter"))
    assert any("lora_B" in name and weight.any() for name, weight in adapter.items())
    return adapter


def find_optimizer(config: str, kind: str) -> list[str]:
    """Flags for plain AdamW if 8-bit AdamW is refused (FSDP2) or replaced by DeepSpeed's own AdamW (offload)."""
    return ["--optim", "adamw_torch"] if kind == "QLoRA" and ("fsdp2" in config or "offload" in config) else []


def in_words(config: str) -> str:
    return NAMES[config.removesuffix("_cpu")]


def test_every_config_is_a_placement_of_each_table():
    configs = {path.stem.removesuffix("_cpu") for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    tables = {
        "NAMES in this file": NAMES.keys(),
        "PLACEMENTS in this file": {"single_gpu", *PLACEMENTS},
        "CPU_TWINS in this file": {"single_gpu", *(config.removesuffix("_cpu") for config in CPU_TWINS)},
        "CONFIGS in plan/placements.py": set(CONFIGS.values()),
    }
    for table, listed in tables.items():
        assert [f"{name}: add it to {table}" for name in sorted(configs - listed)] == []
        assert listed <= configs, table
    assert [f"{name}: add it to placement_table.py" for name in NAMES.values() if name not in ROWS] == []
    page = (ROOT / "docs" / "placements.md").read_text()
    assert [f"{name}: add it to docs/placements.md" for name in NAMES.values() if f"\n| {name} |" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CPU_TWINS)
def test_two_cpu_processes_train_as_one_does(config, kind, run, record_property):
    record_property("placement", ("CPU", in_words(config), kind))
    if "offload" in config and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles its Adam for the host, which needs a compiler")
    flags = ["--use_cpu", *find_optimizer(config, kind)]
    one = run("single_gpu", kind, 4, *flags)
    two = run(config, kind, 2, *flags, launcher=("--num_processes", "2"))
    check_same_run(two, one, kind, in_words(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu", "zero2_cpu", "zero3_cpu", "fsdp2_cpu"])
def test_a_config_for_several_processes_runs_with_one(config, run):
    flags = ["--use_cpu"]
    one = run("single_gpu", "full", 4, *flags)
    alone = run(config, "full", 4, *flags, launcher=("--num_processes", "1"))
    check_same_run(alone, one, "full", "one device" if config == "ddp_cpu" else in_words(config))


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", PLACEMENTS)
def test_all_visible_gpus_train_as_one_does(config, kind, run, record_property):
    if config == "ddp" and GPUS == 1:
        pytest.skip("DDP needs two GPUs")
    record_property("placement", ("GPU", in_words(config), kind))
    flags = find_optimizer(config, kind)
    one = run("single_gpu", kind, 2 * GPUS, *flags)
    check_same_run(run(config, kind, 2, *flags), one, kind, in_words(config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_device_trains(kind, run, record_property):
    record_property("placement", ("GPU" if GPUS else "CPU", "one device", kind))
    folder = run("single_gpu", kind, 4, *([] if GPUS else ["--use_cpu"]))
    check_same_run(folder, folder, kind, "one device")
    assert records(folder)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert records(folder)[-1]["eval_loss"] < 0.6
