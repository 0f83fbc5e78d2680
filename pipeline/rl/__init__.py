"""The same for tasks to act in: policies, trajectories, policy losses (eq. 7)."""
