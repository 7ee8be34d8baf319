"""Runs the training: opening, trainer, checkpoints, bad steps, monitoring, final report."""
