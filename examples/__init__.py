"""Small real applications."""
