"""What a run, a checkpoint, an export, a store or a memory file is, and how two of them differ."""
