"""Supports runs on many hosts: checks before a run, starting it, and its status."""
