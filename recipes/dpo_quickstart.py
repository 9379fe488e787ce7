"""A whole preference-training run in minutes on two CPU cores, without downloads; a program checks every answer.

    accelerate launch recipes/dpo_quickstart.py

A small GPT-2 first learns to answer small requests, as often kindly as curtly. DPO then teaches it to be kind.
"""

from dpokit.story import main

DEFAULTS = {
    "output_dir": "runs/dpo_quickstart",
    # The first run generates both and keeps them.
    "model_name_or_path": "runs/quickstart_base",
    "dataset_name": "runs/quickstart_corpus",
    # The longest pair has fewer tokens, so no pair is cut.
    "max_length": 128,
    # DPO alone reaches 100 % reward accuracy while the answers degenerate. The SFT term on the chosen answer prevents
    # that; at this rate it does much of the work.
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 1.0],
    # Values between 0.1 and 1.0 differ little here.
    "beta": 0.5,
    # Near the rate of the base model's training, and far above that of a real model: at 2e-4 a tenth of the answers
    # broke, at 5e-5 a quarter stayed curt (100 steps, seed 0); from 1e-3 on, at least 98 % are kind and whole.
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 50,
    "max_steps": 150,
    "gradient_checkpointing": False,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "logging_steps": 5,
    # The quickstart may be repeated.
    "overwrite_run": True,
}

if __name__ == "__main__":
    main(__file__, DEFAULTS, program="dpokit.quickstart.run.train_and_judge")
