"""What `infini-ds bench NAME` runs."""
