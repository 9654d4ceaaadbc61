"""Stage II's trainer and what both stages share: checks, checkpoints, resuming, LoRA."""
