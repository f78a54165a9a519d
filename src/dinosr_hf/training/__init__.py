"""What pre-training and fine-tuning share: schedules, arguments, checkpoints and the record of a run."""
