"""The HTTP side: a router over one OpenAI application per model. Knows ASGI, not vLLM."""
