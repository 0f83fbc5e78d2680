"""Tasks that are Markov decision processes: reinforcement learning (paper section 5.3)."""
