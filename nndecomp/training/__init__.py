"""Fit anything that has a loss to a stream of batches."""
