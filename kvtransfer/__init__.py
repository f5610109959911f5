"""Moves paged KV from the worker that computes it to the worker that decodes with it, while it is being computed."""
