"""The figures that the project promises, each beside its peers in one run: `python -m benchmarks [GROUP ...]`."""
