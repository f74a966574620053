"""What is asked of a pair, and how an answer is read."""
