"""Text from a run's model, and documents into its memory."""
