"""Prepare a Dynamo graph for the search: one file a pass."""
