"""Say what was found in a graph and what was decided: records, codes, and their text, JSON and HTML."""
