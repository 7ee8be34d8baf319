"""What a run, a checkpoint, a store or a memory file is, and how two of them differ."""
