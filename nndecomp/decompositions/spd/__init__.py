"""Stochastic parameter decomposition: linear maps of a model as sums of rank-one components, of which few matter on a token."""
