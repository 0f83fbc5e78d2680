"""What parameters are worth, in numbers, figures and words."""
