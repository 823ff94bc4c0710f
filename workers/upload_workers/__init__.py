"""Workers: the runner and one module for each step."""
