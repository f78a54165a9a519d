"""What pre-training and fine-tuning share: schedules and the record of a run."""
