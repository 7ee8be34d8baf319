"""What a model is worth: held-out loss and pass keys found, with its memory on and ablated."""
