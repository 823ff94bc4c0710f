"""Turning each format into Markdown; runs inside guarded processes and is imported by them alone."""
