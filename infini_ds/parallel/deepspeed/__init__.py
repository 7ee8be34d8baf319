"""Everything that touches DeepSpeed's internals: its config, its operators, corrections to it."""
