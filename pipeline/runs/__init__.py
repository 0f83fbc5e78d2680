"""What a run leaves: its folder, checkpoints, MLflow record, a model to use."""
