"""What is wrong with a job's nodes, found in two minutes before it starts. See `__main__` for the commands."""
