"""What every other part of `aegaeon` may build on: errors, time, configuration, environment.

Knows nothing of torch, vLLM or GPU memory, and imports only the standard library, pydantic and
PyYAML, so that the scheduler and the simulator stay importable everywhere.
"""
