"""Text, quality, bytes and speed."""
