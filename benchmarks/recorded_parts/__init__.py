"""What `benchmarks/recorded.py` is made of."""
