"""Computes what a run needs and how its time is spent, without a cluster."""
