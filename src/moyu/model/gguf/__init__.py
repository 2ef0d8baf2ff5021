"""GGUF files, the format of llama.cpp: reader, metadata, tokenizer and loading."""
