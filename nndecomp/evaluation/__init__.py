"""Measure decompositions: the same code for every kind."""
