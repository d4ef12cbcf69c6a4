"""See the docstring of autotune."""
