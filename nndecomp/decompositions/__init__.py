"""The ways of taking a model apart."""
