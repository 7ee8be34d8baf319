"""The commands, one a file: its arguments, their ranges and the call.

A command imports what it needs when it runs: a mistake is told before torch loads.
"""
