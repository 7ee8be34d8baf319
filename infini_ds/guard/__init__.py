"""Notices that a run has stopped making progress, or has been asked to stop."""
