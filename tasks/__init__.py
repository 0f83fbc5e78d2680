"""What is learned: task distributions. Knows nothing of the pipeline; needs torch and numpy."""
