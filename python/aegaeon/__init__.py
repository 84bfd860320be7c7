"""Serve many LLMs on few GPUs: one engine process, models switched between tokens.

Importing this package does nothing; the parts are imported by name (`aegaeon.core`,
`aegaeon.sched`, ...).
"""
