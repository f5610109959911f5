"""Headrace: a server for large language models that splits prefill from decode."""

__version__ = "0.1.0"
