"""A Postgres-native document pipeline: files in, searchable per-user text out, nothing lost."""

__version__ = "0.1.0"
