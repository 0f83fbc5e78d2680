"""The `maml` command: the only part that parses arguments or prints."""
