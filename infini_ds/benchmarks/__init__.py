"""Benchmarks, which `infini-ds bench NAME` runs."""
