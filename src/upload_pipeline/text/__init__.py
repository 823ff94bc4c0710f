"""Markdown as text: normalising and chunking, pure and deterministic."""
