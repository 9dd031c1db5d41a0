"""Plan a step on a device: predict its memory and time, and fit it into a memory budget by recomputation."""
