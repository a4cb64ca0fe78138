"""What is remembered: the entry log, the index, the bodies."""
