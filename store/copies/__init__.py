"""Stores made of stores: exports, merges, one HDF5 file, and videos taken out."""
