"""Low-rank fine-tuning as the papers wrote it: LoRA-GA, LoRA-One, LoRA-Pro and their baselines on PEFT adapters."""
