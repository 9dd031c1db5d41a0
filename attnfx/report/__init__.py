"""Report the sites found in a graph and the decisions on them: records and codes, and their text, JSON and HTML."""
