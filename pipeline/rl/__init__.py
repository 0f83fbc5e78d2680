"""Reinforcement learning: policies, rollouts, policy losses (eq. 7), Fisher products."""
