"""End to end: real files, real worker processes, a real database."""
