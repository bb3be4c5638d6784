"""Tables and figures of an experiment, computed from nothing but its records: `python -m experiments.report`."""
