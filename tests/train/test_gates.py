"""Gates of the training steps: each stops a wrong run, and healthy runs pass it."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_pairs
from test_launch import TWO, launch
from torch import nn

from dpokit.checkpoint.resume import claim_folder
from dpokit.errors import GateError
from dpokit.run import build_trainer, train
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.checks import LOSS_TYPES
from dpokit.settings.load import has_bf16_processor, load_settings
from dpokit.train.dpo_trainer import PairTrainer
from dpokit.train.gates import LN_2_LOSSES, GateCallback, Gates, find_dead_modules

LN_2 = math.log(2)
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture
def defaults(tiny_gpt2, tmp_path, monkeypatch) -> dict:
    # Of its own: with a reference that another test has kept, the trainer would load none.
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "cache"))
    pairs = write_pairs(tmp_path / "pairs.jsonl", 16)
    places = {"model_name_or_path": tiny_gpt2, "dataset_name": pairs, "output_dir": tmp_path / "run"}
    return {
        **{name: str(path) for name, path in places.items()},
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
    }


@pytest.fixture
def run(defaults) -> Callable[..., tuple[RunDir, list[dict]]]:
    """Trains with changed defaults; returns the folder and its records."""

    def go(*argv: str, **changes) -> tuple[RunDir, list[dict]]:
        overwrite = [] if "--resume_from_checkpoint" in argv else ["--overwrite_run"]
        done = train("dpo_test", {**defaults, **changes}, [*argv, *overwrite])
        assert done.read_run()["state"] == "finished"
        return done, read_metrics(done.metrics_jsonl)

    return go


@pytest.fixture
def build(defaults) -> Callable[..., PairTrainer]:
    """A trainer with its gates, which a test damages before it trains."""

    def go(mode: str = "stop", *, with_adapter: bool | None = None, **changes) -> PairTrainer:
        settings = load_settings("dpo_test", {**defaults, **changes}, [])
        folder = RunDir(settings.training.output_dir)
        claim_folder(folder, settings, world_size=1, placement="one device")
        gates = Gates(mode)
        trainer, _ = build_trainer(folder, settings, gates)
        with_adapter = settings.model.use_peft if with_adapter is None else with_adapter
        trainer.add_callback(GateCallback(trainer, gates, with_adapter=with_adapter))
        return trainer

    return go


@pytest.fixture
def warnings(capfd) -> Callable[[], list[str]]:
    """The warnings of gates that were printed so far."""
    return lambda: [line for line in capfd.readouterr().err.splitlines() if "gate (warning)" in line]


def damage(folder: Path, model: Path, change: Callable[[nn.Module], None]) -> str:
    """A copy of a model folder with changed weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    damaged = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        change(damaged)
    damaged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


# -- the first loss ----------------------------------------------------------------------------------------------------


def use_another_reference(trainer: PairTrainer) -> None:
    with torch.no_grad():
        for weight in trainer.ref_model.parameters():
            weight += 0.05 * torch.randn_like(weight)


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_another_model_as_reference_stops_the_run_for_every_loss(kind, build):
    trainer = build(loss_type=kind, label_smoothing=0.1)
    use_another_reference(trainer)
    message = "the first loss is .* not ln 2 = 0.6931" if kind in LN_2_LOSSES else "the first rewards are not 0"
    with pytest.raises(GateError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1


def test_another_model_as_reference_is_one_warning_in_mode_warn(build, warnings):
    trainer = build("warn", max_steps=3)
    use_another_reference(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    (line,) = warnings()
    assert "policy and reference are not the same model at the start" in line


def test_a_reference_cached_for_another_ld_alpha_is_not_used(run, warnings):
    """TRL's own cache uses log-probs that were precomputed without ld_alpha even if it is set."""
    run(precompute_ref_log_probs=True)
    _, records = run(ld_alpha=0.0, precompute_ref_log_probs=True)
    assert records[0]["loss"] == pytest.approx(LN_2, abs=1e-4)
    assert warnings() == []


def test_a_loss_of_another_scale_stops_the_run(build):
    trainer = build()
    compute = trainer.compute_loss
    # As a loss that is not divided by the number of micro-batches.
    trainer.compute_loss = lambda *args, **kwargs: 4 * compute(*args, **kwargs)
    with pytest.raises(GateError, match=r"the first loss is 2\.77.*its scale is wrong"):
        trainer.train()


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_loss_passes_on_a_healthy_run(kind, run, warnings):
    _, records = run(loss_type=kind, label_smoothing=0.1)
    assert (records[0]["loss"] == pytest.approx(LN_2, abs=1e-4)) == (kind in LN_2_LOSSES)
    assert warnings() == []


HEALTHY = {
    "mixture": {"loss_type": ["sigmoid", "aot", "robust"], "loss_weights": [1.0, 0.5, 2.0]},
    "mixture with a negative weight": {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.0, -1.5]},
    "mixture with SFT": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "JS divergence": {"f_divergence_type": "js_divergence"},
    "alpha divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "label smoothing": {"label_smoothing": 0.2},
    "ld_alpha": {"ld_alpha": 0.3},
    "WPO weights": {"use_weighting": True},
    "dropout": {"disable_dropout": False},
    "large beta": {"beta": 5.0},
    "precomputed reference": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "gradient accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 3},
    "one pair": {"max_train_samples": 1, "gradient_accumulation_steps": 4, "max_steps": 2},
    "stream": {"dataset_streaming": True},
    "warm-up from 0": {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 2},
    "no clipping": {"max_grad_norm": 0.0},
    "no logs": {"logging_strategy": "no", "max_steps": 2},
    "logs by epoch": {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
    "rare logs": {"logging_steps": 100, "max_steps": 2},
    "evaluation at the start": {"eval_strategy": "steps", "eval_on_start": True, "eval_fraction": 0.25},
    "16 bit": {"dtype": "bfloat16"},
    "LoRA": LORA,
    "LoRA and dropout": {**LORA, "lora_dropout": 0.5},
    "LoRA, dropout left on": {**LORA, "lora_dropout": 0.5, "disable_dropout": False},
    "LoRA with gradient checkpointing": {**LORA, "gradient_checkpointing": True},
    "LoRA with re-entrant checkpointing": {
        **LORA,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "LoRA on all layers": {**LORA, "lora_target_modules": "all-linear"},
    "LoRA on the embedding": {**LORA, "lora_target_modules": ["c_attn", "wte"]},
    "LoRA beside a trained layer": {**LORA, "lora_target_modules": ["c_attn"], "lora_modules_to_save": ["ln_f"]},
    "LoRA with precomputed reference": {**LORA, "precompute_ref_log_probs": True},
    "rsLoRA": {**LORA, "use_rslora": True},
    "QLoRA": {**LORA, "load_in_4bit": True, "gradient_checkpointing": True, "lora_target_modules": "all-linear"},
    "QLoRA in 8 bit": {**LORA, "load_in_8bit": True, "lora_target_modules": "all-linear"},
}


@pytest.mark.parametrize("changes", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_passes_all_gates(changes, run, warnings):
    _, records = run(**changes)
    assert records[0]["step"] <= 1
    assert warnings() == []


def test_dora_passes_all_gates(run, tiny_qwen2, warnings):
    run(**LORA, use_dora=True, lora_target_modules="all-linear", model_name_or_path=str(tiny_qwen2))
    assert warnings() == []


@pytest.mark.parametrize("start", ["gaussian", "pissa", "olora", "orthogonal", False])
def test_an_adapter_with_another_initialisation_passes(start, build, tiny_qwen2, monkeypatch):
    """No flag sets these. If the initialisation changes the policy, the gate cannot be certain."""
    import dpokit.run
    from dpokit.model.load import build_peft_config

    def initialise_otherwise(*args):
        config = build_peft_config(*args)
        config.init_lora_weights = start
        return config

    monkeypatch.setattr(dpokit.run, "build_peft_config", initialise_otherwise)
    trainer = build(**LORA, lora_target_modules=["q_proj"], model_name_or_path=str(tiny_qwen2))
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.skipif(not has_bf16_processor(), reason="needs a processor with bf16")
@pytest.mark.parametrize("changes", [{}, LORA, {"precompute_ref_log_probs": True}], ids=["full", "LoRA", "precomputed"])
def test_bf16_on_a_processor_that_has_it_passes(changes, run, warnings):
    _, records = run(bf16=True, use_cpu=True, **changes)
    assert records[0]["loss"] == pytest.approx(LN_2, abs=5e-3)
    assert warnings() == []


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_a_resumed_run_with_a_trained_policy_passes(kind, run, warnings):
    """With a hinge loss all pairs are beyond the margin after some steps: a gradient of 0 is right then."""
    kept = {"loss_type": kind, "beta": 5.0, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    run(**kept, max_steps=3)
    resume = ("--resume_from_checkpoint", "auto", "--accept_changes", "max_steps")
    _, records = run(*resume, **kept, max_steps=4)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["rewards/margins"] > 1
    assert records[-1]["grad_norm"] == 0 or kind == "sigmoid"
    assert warnings() == []


# -- the gradient ------------------------------------------------------------------------------------------------------


def test_a_frozen_adapter_stops_the_run(build):
    trainer = build(**LORA)
    trainer.model.requires_grad_(False)
    with pytest.raises(GateError, match="the adapter receives no gradient: no parameter of the model may be trained"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_without_a_path_to_the_loss_stops_the_run(build):
    """As in a model whose code computes without gradients."""
    trainer = build(**LORA)
    trainer.model.get_base_model().transformer.ln_f.register_forward_hook(lambda *io: io[2].detach())
    with pytest.raises(GateError, match="no parameter that is trained takes part in the loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def bypass(blocks: list[nn.Module]) -> None:
    """As a fused kernel does: it uses the weight of the layer, but not its adapter."""
    for block in blocks:
        block.mlp.c_fc.forward = block.mlp.c_fc.get_base_layer().forward


@pytest.mark.parametrize("mode", ["stop", "warn"])
def test_layers_that_skip_their_adapter_stop_the_run(mode, build, warnings):
    trainer = build(mode, **LORA, lora_target_modules=["c_fc", "c_attn"], max_steps=2)
    bypass(list(trainer.model.get_base_model().transformer.h))
    if mode == "stop":
        with pytest.raises(GateError, match=r"receives no gradient: .*h\.\*\.mlp\.c_fc\n"):
            trainer.train()
        return
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(warnings()) == 1


def test_one_layer_of_many_that_skips_its_adapter_passes(build):
    """As in a model whose late layers reuse the keys of earlier ones."""
    trainer = build(**LORA, lora_target_modules=["c_fc", "c_attn"])
    bypass(list(trainer.model.get_base_model().transformer.h)[1:])
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("mode", ["stop", "warn"])
def test_a_gradient_of_zero_stops_the_run(mode, build, warnings):
    trainer = build(mode, max_steps=2)
    for weight in trainer.model.parameters():
        weight.register_hook(torch.zeros_like)
    if mode == "stop":
        with pytest.raises(GateError, match="the model receives no gradient: the norm of its gradient is 0"):
            trainer.train()
        return
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(warnings()) == 1


def test_fp16_may_overflow_for_50_steps_and_no_more(build):
    """Its loss scaling starts too high. A CPU has no fp16 training, so the test calls the gate itself."""
    trainer = build()
    trainer.args.fp16 = True
    gate = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GateCallback))
    gate.first_step = 7
    for step, norm in ((7, math.inf), (8, math.nan), (56, math.inf)):
        gate._check_gradient(trainer.args, step, norm)
    with pytest.raises(GateError, match="the gradient is not finite at step 57"):
        gate._check_gradient(trainer.args, 57, math.inf)


PART = "base_model.model.model.language_model.layers.{}.{}.lora_A.default.weight"
TOWER = "base_model.model.model.vision_tower.encoder.layers.{}.{}.lora_A.default.weight"


@pytest.mark.parametrize(
    ("reached", "dead"),
    [
        ({PART.format(0, "mlp.up"): True, PART.format(1, "mlp.up"): True}, []),
        ({PART.format(0, "mlp.up"): False, PART.format(0, "mlp.down"): False}, ["mlp.up", "mlp.down"]),
        (
            {PART.format(0, "attn.q"): True, PART.format(0, "mlp.up"): False, PART.format(1, "mlp.up"): False},
            ["mlp.up"],
        ),
        ({PART.format(0, "attn.k"): True, PART.format(1, "attn.k"): False}, []),
        ({PART.format(0, "attn.q"): True, TOWER.format(0, "attn.q"): False, TOWER.format(1, "attn.q"): False}, []),
        ({PART.format(0, "attn.q"): True, "base_model.model.lm_head.lora_B.default.weight": False}, ["lm_head"]),
        (
            {PART.format(0, "attn.q"): True, "base_model.model.lm_head.modules_to_save.default.weight": False},
            ["lm_head"],
        ),
        (
            {PART.format(0, "attn.q"): True, "base_model.model.model.projector.linear_1.lora_B.default.weight": False},
            [],
        ),
        ({}, []),
    ],
)
def test_dead_modules_have_no_gradient_in_a_layer_that_has_one(reached, dead):
    names = find_dead_modules(reached)
    assert len(names) == len(dead)
    assert all(name.endswith(end) for name, end in zip(names, dead, strict=True))


def test_a_mixture_with_experts_without_a_token_passes(run, plain_tokenizer, tmp_path, warnings):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16}
    size |= {"num_experts": 32, "num_experts_per_tok": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    size |= {"head_dim": 16, "vocab_size": len(plain_tokenizer), "max_position_embeddings": 256}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**size)).save_pretrained(tmp_path / "moe")
    plain_tokenizer.save_pretrained(tmp_path / "moe")
    for targets in (["q_proj", "v_proj"], "all-linear"):
        run(**LORA, lora_dropout=0.0, model_name_or_path=str(tmp_path / "moe"), lora_target_modules=targets)
    run(model_name_or_path=str(tmp_path / "moe"))
    assert warnings() == []


# -- a loss that is not finite -----------------------------------------------------------------------------------------


def test_a_model_whose_weights_overflow_stops_at_the_first_step(run, defaults, tiny_gpt2, tmp_path):
    damaged = damage(tmp_path / "nan", tiny_gpt2, lambda model: model.transformer.ln_f.weight.fill_(HUGE))
    with pytest.raises(GateError, match="not finite at step 1"):
        run(model_name_or_path=damaged, save_strategy="steps", save_steps=1)
    folder = RunDir(defaults["output_dir"])
    assert folder.read_run()["state"] == "failed"
    assert "not finite at step 1" in folder.read_run()["why"]
    assert folder.checkpoints() == []
    assert not folder.model.exists()


HUGE = 3e38  # finite, so that the model loads; the sum of two is infinite
RUINOUS = {"learning_rate": 1e30, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("logging", [{}, {"logging_strategy": "no"}, {"logging_steps": 3}], ids=["all", "none", "rare"])
def test_a_ruinous_rate_stops_the_run_before_its_step_is_saved(logging, run, defaults):
    with pytest.raises(GateError, match="not finite at step 2"):
        run(**RUINOUS, **logging)
    folder = RunDir(defaults["output_dir"])
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-1"]
    lines = folder.metrics_jsonl.read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail)["step"] for line in lines)


def test_a_ruinous_rate_stops_the_run_before_its_epoch_is_saved(run, defaults):
    epochs = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "logging_strategy": "epoch"}
    with pytest.raises(GateError, match="not finite at step 2"):
        run(**{**RUINOUS, **epochs})
    assert RunDir(defaults["output_dir"]).checkpoints() == []


def test_a_run_without_checkpoints_and_logs_stops_at_its_end(run, defaults):
    with pytest.raises(GateError, match="not finite at step 2"):
        run(**{**RUINOUS, "save_strategy": "no", "logging_strategy": "no"})
    assert not RunDir(defaults["output_dir"]).model.exists()


def test_a_nan_evaluation_stops_the_run_before_its_step_is_saved(run, defaults):
    with pytest.raises(GateError, match="the evaluation's loss at step 1 is nan"):
        run(**RUINOUS, eval_strategy="steps", eval_steps=1, eval_fraction=0.25)
    assert RunDir(defaults["output_dir"]).checkpoints() == []


def test_a_nan_loss_is_one_line_and_valid_json_in_mode_warn(run, warnings):
    done, _ = run("--gates", "warn", **RUINOUS)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in done.metrics_jsonl.read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line][1:] == [None, None, None]
    assert len(warnings()) == 1


def test_nan_evaluations_leave_no_best_one_in_mode_warn(run, warnings):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    done, _ = run("--gates", "warn", **RUINOUS, **best, eval_strategy="steps", eval_steps=1, eval_fraction=0.25)
    assert done.read_run()["best"] is None
    assert len(warnings()) == 2  # the evaluation's loss, and the training loss after it


def test_a_nan_on_one_rank_stops_all_ranks_with_one_message(tiny_gpt2, tmp_path):
    """Only one long pair reaches the positions that overflow, so the loss of one rank is not finite."""

    def change(model: nn.Module) -> None:
        model.transformer.wpe.weight[60:] = HUGE

    model = damage(tmp_path / "nan", tiny_gpt2, change)
    rows = [json.dumps({"prompt": "A?", "chosen": f" Yes {i}.", "rejected": " No."}) for i in range(15)]
    rows.append(json.dumps({"prompt": "A?" + " good" * 30, "chosen": " Yes." * 40, "rejected": " No."}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    done = launch(
        TWO,
        *("--model_name_or_path", model, "--dataset_name", str(tmp_path / "pairs.jsonl")),
        *("--output_dir", str(tmp_path / "run"), "--max_length", "128", "--per_device_train_batch_size", "1"),
        *("--gradient_accumulation_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"),
        *("--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "1", "--save_total_limit", "20"),
        *("--loss_type", "sigmoid", "--loss_weights", "1.0", "--report_to", "none", "--logging_steps", "50"),
    )
    assert done.returncode != 0
    assert done.stderr.count("GateError: the loss or its gradient is not finite at step ") == 1
    folder = RunDir(tmp_path / "run")
    record = folder.read_run()
    assert record["state"] == "failed"
    step = int(record["why"].splitlines()[0].rsplit(" ", 1)[1])
    assert [path.name for path in folder.checkpoints()] == [f"checkpoint-{n}" for n in range(1, step)]


# -- placement and adapter ---------------------------------------------------------------------------------------------


def test_a_missing_adapter_stops_the_run(build):
    with pytest.raises(GateError, match="--use_peft requests an adapter"):
        build(with_adapter=True).train()


def test_an_adapter_without_the_flag_stops_the_run(build):
    with pytest.raises(GateError, match="through an adapter, but --use_peft is false"):
        build(**LORA, with_adapter=False).train()


@pytest.mark.parametrize("mode", ["stop", "warn"])
def test_sharding_requested_for_one_process_stops_the_run(mode, run, monkeypatch, warnings):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    if mode == "stop":
        with pytest.raises(GateError, match=r"placed by FSDP2 over 1 process.*, but it is by one device"):
            run()
        return
    run("--gates", "warn")
    assert len(warnings()) == 1


def test_a_model_split_over_two_gpus_of_a_process_stops_the_run(build):
    trainer = build()
    trainer.args._n_gpu = 2  # transformers sets it in a process with two GPUs
    with pytest.raises(GateError, match="it is by DataParallel"):
        trainer.train()


@pytest.mark.slow
def test_fsdp2_that_silently_becomes_ddp_stops_both_processes(tiny_gpt2, tmp_path):
    """accelerate runs DDP on CPU unless `shard_on_cpu` changes it."""
    script = tmp_path / "unsharded.py"
    script.write_text(
        "import dpokit.train.steps\n"
        "dpokit.train.steps.shard_on_cpu = lambda args: None\n"
        "from dpokit.story import main\n"
        "main(__file__, {})\n"
    )
    config = ROOT / "accelerate_configs" / "fsdp2_cpu.yaml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)),
            *("--model_name_or_path", str(tiny_gpt2), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"),
            *("--dataset_name", str(write_pairs(tmp_path / "pairs.jsonl", 8)), "--report_to", "none"),
            *("--gradient_checkpointing", "false"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("GateError: the model was to be placed by FSDP2 over 2 processes, but it is by DDP") == 1


@pytest.mark.slow
def test_one_process_of_torchrun_passes_all_gates(tiny_gpt2, tmp_path):
    """accelerate still wraps the model in DDP, which does nothing for one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / "dpo_gpt2.py"), *short_flags(tiny_gpt2, tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert RunDir(tmp_path / "run").read_run()["placement"] == "one device"


@pytest.mark.slow
def test_a_compiled_model_on_two_processes_passes_all_gates(tiny_gpt2, tmp_path):
    done = launch(TWO, *short_flags(tiny_gpt2, tmp_path), "--torch_compile", "--torch_compile_backend", "eager")
    assert done.returncode == 0, done.stderr[-3000:]
    assert RunDir(tmp_path / "run").read_run()["placement"] == "DDP"


def short_flags(model: Path, folder: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--dataset_name", str(write_pairs(folder / "pairs.jsonl", 8))),
        *("--output_dir", str(folder / "run"), "--max_length", "64", "--max_steps", "1", "--eval_strategy", "no"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--save_strategy", "no"),
        *("--load_best_model_at_end", "false", "--report_to", "none", "--loss_type", "sigmoid", "--loss_weights", "1"),
    ]


# -- message and exit code ---------------------------------------------------------------------------------------------


def test_a_gate_prints_one_message_and_exits_with_code_2(tiny_gpt2, tmp_path):
    damaged = damage(tmp_path / "nan", tiny_gpt2, lambda model: model.transformer.ln_f.weight.fill_(HUGE))
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "dpo_gpt2.py"), *short_flags(Path(damaged), tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("GateError: the loss or its gradient is not finite at step 1") == 1
    assert "Traceback" not in done.stderr
    record = RunDir(tmp_path / "run").read_run()
    assert record["state"] == "failed"
    assert "--gates warn" in record["why"]
