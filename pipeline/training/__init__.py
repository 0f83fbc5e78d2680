"""The driver: meta-gradients of chunks become the next parameters, until done."""
