"""What the program needs of the machine: files that appear whole, locks, console, exit codes."""
