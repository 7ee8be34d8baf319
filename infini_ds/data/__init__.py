"""Documents, their tokens, the store of them, and the windows that lanes read."""
