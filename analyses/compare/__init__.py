"""Two captures side by side."""
