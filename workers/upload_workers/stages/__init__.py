"""The steps of each pipeline, one module a step."""
