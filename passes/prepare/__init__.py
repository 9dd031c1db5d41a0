"""Prepare a Dynamo graph for the search: one pass per file."""
