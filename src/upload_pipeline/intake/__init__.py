"""Accepting files: checks, streaming to the store, and the transaction that makes them jobs."""
