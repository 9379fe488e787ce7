"""Llama-3.1-8B on UltraFeedback: full fine-tuning, sharded over the GPUs of one node or more.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo_8b.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/dpo_8b.py --precompute_ref_log_probs false
    accelerate launch --config_file accelerate_configs/zero3_offload.yaml recipes/dpo_8b.py

Weights, gradients and optimizer states of 8B parameters need more memory than one GPU has; `dpokit plan
recipes/dpo_8b.py --gpus 8x80` shows where they fit. Every flag of TRL's DPOConfig, ModelConfig and ScriptArguments
works; `--help-all` lists them.
"""

from dpokit.story import main

DEFAULTS = {
    "output_dir": "runs/dpo_8b",
    # The base has no chat template and trains on plain transcripts; an instruct or SFT model keeps its template.
    "model_name_or_path": "meta-llama/Llama-3.1-8B",
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "dataset_train_split": "train_prefs",
    "dataset_test_split": "test_prefs",
    "max_eval_samples": 1000,
    "max_length": 1024,
    # The weights are loaded in bf16; ZeRO and FSDP2 keep the trained copy in fp32.
    "dtype": "bfloat16",
    # A tenth of the rate for LoRA, because every weight changes.
    "learning_rate": 5e-7,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    # 64 pairs a step on 8 GPUs.
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1,
    "beta": 0.1,
    # The reference's log-probs are computed once, before the first step, instead of keeping 8B more weights.
    "precompute_ref_log_probs": True,
    # Recomputing activations costs a third more time; stored, they would need more memory than the weights.
    "gradient_checkpointing": True,
    # The run keeps the checkpoint with the lowest eval loss. One checkpoint of 8B weights and Adam's states is 100 GB.
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
