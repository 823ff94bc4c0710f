"""Parsers and embedders behind one small Protocol each."""
