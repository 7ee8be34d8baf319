"""Weights to and from other forms."""
