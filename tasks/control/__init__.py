"""Tasks as Markov decision processes: reinforcement learning (paper section 5.3)."""
