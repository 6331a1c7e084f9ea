"""The command table and the handlers it names."""
