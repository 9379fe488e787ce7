"""GPT-2 on Anthropic's helpful and harmless preferences, full fine-tune; any causal LM and any pairs by flag.

    accelerate launch recipes/dpo_gpt2.py
    accelerate launch recipes/dpo_gpt2.py --config recipes/presets/gpt2_hh_512.yaml
    accelerate launch recipes/dpo_gpt2.py --dataset_name pairs.jsonl --eval_fraction 0.05
    accelerate launch recipes/dpo_gpt2.py --use_peft --learning_rate 1e-4 --output_dir runs/gpt2_lora
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/dpo_gpt2.py

Every flag of TRL's DPOConfig, ModelConfig and ScriptArguments works; `--help-all` lists them.
"""

from dpokit.story import main

DEFAULTS = {
    "output_dir": "runs/dpo_gpt2",
    "model_name_or_path": "openai-community/gpt2",
    "dataset_name": "Anthropic/hh-rlhf",
    # 1,000 held-out pairs: accuracy to 1.5 points (one standard error), in an eighth of the whole split's time.
    "max_eval_samples": 1000,
    # Longer pairs are cut from the prompt's start; 1,024 (all positions) costs memory that only the few longest need.
    "max_length": 512,
    # The published runs used 5e-5 and ended with an eval loss above ln 2, worse than the untrained model. A fifth of
    # that rate learns more slowly and reaches a best checkpoint worth keeping.
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    # 32 pairs a step on one device. Fewer make the margin noisy; more need a higher learning rate.
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 16,
    # Preference pairs are memorised early: more epochs mostly move the training metrics.
    "num_train_epochs": 1,
    "beta": 0.1,
    # Pure DPO may lower the chosen answers' log-probs too, as long as the rejected ones fall faster. A small SFT term
    # on the chosen answers holds them; set loss_type to sigmoid for the plain loss.
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.1],
    # Activations of a 124M model fit on any GPU; recomputing them would cost a fifth of the speed.
    "gradient_checkpointing": False,
    # The run keeps the checkpoint with the lowest eval loss: the last one is often overfitted.
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
