"""Compile a graph in five steps: prepare, find, choose, verify, apply."""
