"""An OpenAI-compatible server on MOYU's engine: one thread steps all sequences, a web application hands it requests."""
