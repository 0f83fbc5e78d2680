"""Who the workers are: this process, Ray actors, or a whole command as a job of a cluster."""
