"""Decides which rank holds what and how ranks work together, on top of DeepSpeed."""
