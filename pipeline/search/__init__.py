"""Which settings: Ray Tune around the loop."""
