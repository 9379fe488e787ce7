"""Llama-3.1-8B in 4 bit with LoRA (QLoRA) on UltraFeedback, on one 24 GB GPU or many; any 7-8B model by flag.

    accelerate launch recipes/dpo_qlora.py
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/dpo_qlora.py
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/dpo_qlora.py
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dpo_qlora.py
    accelerate launch recipes/dpo_qlora.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir runs/qwen_qlora

Every flag of TRL's DPOConfig, ModelConfig and ScriptArguments works; `--help-all` lists them.
"""

from dpokit.story import main

DEFAULTS = {
    "output_dir": "runs/dpo_qlora",
    # The base has no chat template and trains on plain transcripts; an instruct or SFT model keeps its template.
    "model_name_or_path": "meta-llama/Llama-3.1-8B",
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "dataset_train_split": "train_prefs",
    "dataset_test_split": "test_prefs",
    "max_eval_samples": 1000,
    "max_length": 1024,
    # 4-bit NormalFloat with quantised scales: 8B weights take 5.5 GB instead of 16 (arXiv 2305.14314).
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": True,
    # The dtype of weights that are not quantised, and of 4-bit weights when they are unpacked for a product.
    "dtype": "bfloat16",
    # LoRA on every linear layer: the QLoRA paper found that this, more than the rank, matches full fine-tuning.
    "use_peft": True,
    "lora_target_modules": ["all-linear"],
    "lora_r": 16,
    "lora_alpha": 32,
    # No dropout: policy and reference must be the same network.
    "lora_dropout": 0.0,
    # Optimizer states in 8 bit, which move to host memory when the GPU's runs out; on CPU, plain AdamW.
    "optim": "paged_adamw_8bit",
    # Adapters start at zero and tolerate ten times the rate of full fine-tuning.
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    # 32 pairs a step on one device; more devices: fewer accumulation steps.
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "per_device_eval_batch_size": 2,
    "num_train_epochs": 1,
    "beta": 0.1,
    # Recomputing activations costs a third more time, and makes 1,024 tokens fit.
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
