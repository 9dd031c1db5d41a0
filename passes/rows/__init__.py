"""Find and replace regions whose rows do not depend on each other."""
