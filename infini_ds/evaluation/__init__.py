"""What a model is worth: held-out loss with its memory on and ablated."""
