"""What notices that a run has stopped, or is to stop."""
