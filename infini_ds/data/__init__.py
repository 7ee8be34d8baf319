"""Turns documents into tokens, stores them, and plans the windows that each lane reads."""
