"""The mathematics, torch and numpy alone: adapt (eq. 2), judge (eq. 3), meta-gradient (eq. 4)."""
