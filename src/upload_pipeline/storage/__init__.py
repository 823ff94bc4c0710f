"""The object store: keys, streaming in and out."""
