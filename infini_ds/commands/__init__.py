"""The commands, one per file: its arguments, their ranges and the call.

A command imports what it needs only when it runs, so that mistakes are reported before torch loads.
"""
