"""Converts weights to and from other formats."""
