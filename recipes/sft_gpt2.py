"""GPT-2 on the chosen answers of Anthropic's preferences, as the start of a DPO run; any causal LM by flag.

    accelerate launch recipes/sft_gpt2.py
    accelerate launch recipes/dpo_gpt2.py --model_name_or_path runs/sft_gpt2

The second command starts from the model of the first one, which is also its reference. Every flag of TRL's SFTConfig,
ModelConfig and ScriptArguments works; `--help-all` lists them.
"""

from dpokit.story import main

DEFAULTS = {
    # TRL's SFTTrainer instead of its DPOTrainer; rows, run folder and resume are the same.
    "kind": "sft",
    "output_dir": "runs/sft_gpt2",
    "model_name_or_path": "openai-community/gpt2",
    "dataset_name": "Anthropic/hh-rlhf",
    "max_eval_samples": 1000,
    # The same as in the DPO run, so that both share their cached tokens.
    "max_length": 512,
    # A common rate for small models; DPO uses a fifth of it.
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    # 32 answers a step on one device.
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 16,
    # The model shall learn the style of the answers, not memorise them.
    "num_train_epochs": 1,
    # Activations of a 124M model fit on any GPU; recomputing them would cost a fifth of the speed.
    "gradient_checkpointing": False,
    # The run keeps the checkpoint with the lowest loss on held-out chosen answers.
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "logging_steps": 10,
}

if __name__ == "__main__":
    main(__file__, DEFAULTS)
