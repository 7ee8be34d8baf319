"""Describes a run, checkpoint, export, store or memory file, and how two of them differ."""
