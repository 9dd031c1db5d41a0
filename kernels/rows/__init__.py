"""Run a row program in chunks of rows, by its own ATen calls or as one compiled body."""
