"""What a worker does with a chunk of tasks; knows no Ray."""
