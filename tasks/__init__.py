"""Task distributions: what is learned. They import torch and numpy, and nothing of the pipeline."""
