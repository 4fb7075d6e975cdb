"""What is counted, measured and reported: parameters and FLOPs, loop statistics, progress."""
