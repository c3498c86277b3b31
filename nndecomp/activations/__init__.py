"""From tokens to shuffled rows of activations."""
