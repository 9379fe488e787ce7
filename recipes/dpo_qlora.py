"""Llama-3.1-8B in 4 bit with LoRA (QLoRA) on UltraFeedback, on one 24 GB GPU or many; any 7-8B model by flag.

    accelerate launch recipes/dpo_qlora.py
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/dpo_qlora.py
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/dpo_qlora.py
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo_qlora.py
    accelerate launch recipes/dpo_qlora.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir runs/qwen_qlora

Every flag of TRL's DPOConfig, ModelConfig and ScriptArguments works; `--help` lists them.
"""

from dpokit.story import main

DEFAULTS = {
    "output_dir": "runs/dpo_qlora",
    # The base has no chat template and is taught plain transcripts; an instruct or SFT model by flag keeps its own.
    "model_name_or_path": "meta-llama/Llama-3.1-8B",
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "dataset_train_split": "train_prefs",
    "dataset_test_split": "test_prefs",
    "max_eval_samples": 1000,
    "max_length": 1024,
    # 4-bit NormalFloat, its scales quantised once more: 8B weights take 5.5 GB instead of 16 (arXiv 2305.14314).
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    # What is not quantised, and what 4-bit weights are unpacked to for each product.
    "dtype": "bfloat16",
    # LoRA on every linear layer: the QLoRA paper found that this, more than the rank, matches full fine-tuning.
    "use_peft": True,
    "lora_target_modules": ["all-linear"],
    "lora_r": 16,
    "lora_alpha": 32,
    # Preference training has no dropout: policy and reference must see the same network.
    "lora_dropout": 0.0,
    # Optimizer states in 8 bit, moved to the host when the GPU's memory runs out; on CPU plain AdamW.
    "optim": "paged_adamw_8bit",
    # Adapters start at zero and bear ten times the rate of a full fine-tune.
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    # 32 pairs a step on one device; more devices: fewer accumulation steps.
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1,
    "beta": 0.1,
    # Recomputing activations costs a third more time, and is what makes 1,024 tokens fit.
    "gradient_checkpointing": True,
    # The best checkpoint by eval loss is what is kept.
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
