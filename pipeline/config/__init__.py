"""What is asked for: YAML and overrides become one Experiment that checks itself."""
