"""Code that `infini-ds convert to-hf` puts beside the weights; it needs only transformers.

Nothing here imports the rest of the package, and the package imports nothing from here.
"""
