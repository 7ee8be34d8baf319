"""Wraps the operating system and the machine: files, locks, console, exit codes, hardware."""
