"""Qwen2-0.5B-Instruct on UltraFeedback's preferences, with its chat template; any chat model and any pairs by flag.

    accelerate launch recipes/dpo_qwen2.py
    accelerate launch recipes/dpo_qwen2.py --config recipes/presets/qwen2_dahoas.yaml
    accelerate launch recipes/dpo_qwen2.py --use_peft --learning_rate 1e-5 --output_dir runs/qwen2_lora

Every flag of TRL's DPOConfig, ModelConfig and ScriptArguments works; `--help-all` lists them.
"""

from dpokit.story import main

DEFAULTS = {
    "output_dir": "runs/dpo_qwen2",
    "model_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "dataset_train_split": "train_prefs",
    "dataset_test_split": "test_prefs",
    "max_eval_samples": 1000,
    # The answers are long: 1,024 tokens hold most pairs whole, at twice the memory of 512.
    "max_length": 1024,
    # An instruct model is already aligned; a tenth of GPT-2's rate preserves that.
    "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    # 32 pairs a step on one device; with a vocabulary of 152,000 tokens, logits need more memory than weights.
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 16,
    "per_device_eval_batch_size": 4,
    "num_train_epochs": 1,
    "beta": 0.1,
    # A fifth slower, but the run fits on a 24 GB GPU only with it.
    "gradient_checkpointing": True,
    # The run keeps the checkpoint with the lowest eval loss.
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
