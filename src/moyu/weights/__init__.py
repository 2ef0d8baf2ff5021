"""How numbers lie in memory."""
