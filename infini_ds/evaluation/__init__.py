"""Measures a model by held-out loss and pass-key retrieval, with its memory on and ablated."""
