"""Models: loading, dissecting into blocks, and the modules that hold stored weights."""
