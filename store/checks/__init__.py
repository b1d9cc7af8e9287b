"""Stores held against what they should be: every byte, every row, and each other."""
