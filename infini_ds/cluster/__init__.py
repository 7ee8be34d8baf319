"""What people need around a run on many hosts: checks before it, and how it fares."""
