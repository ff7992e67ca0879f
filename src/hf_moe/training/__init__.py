"""Fine-tuning: a thin trainer, and recipes that run whole jobs."""
