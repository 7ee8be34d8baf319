"""The run: trainer, optimizer groups, checkpoints, monitoring."""
