"""MOYU's own quantiser: from weights of 16 bits to the types of GGUF files, fitted to what a text puts into each linear."""
