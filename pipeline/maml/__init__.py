"""Adaptation (eq. 2), meta-loss (eq. 3) and meta-gradient (eq. 4), on torch and numpy alone."""
