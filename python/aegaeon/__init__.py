"""aegaeon: many LLMs in one engine process, switched between tokens."""
