"""The commands that write text with a run's model and read documents into its memory."""
