"""Techniques beside their peers at the shape of gpt2-small; each runs by itself in the peers' environment."""
