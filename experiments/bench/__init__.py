"""Speed and memory of the suite beside other implementations: `python -m experiments.bench`, or `make bench`."""
