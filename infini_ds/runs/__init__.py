"""The files that a run leaves on disk, and how to read them."""
