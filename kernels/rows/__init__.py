"""Run a row program in chunks of rows, through its own ATen calls or as one compiled body."""
