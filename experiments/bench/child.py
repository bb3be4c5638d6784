"""One measurement in a process of its own: `python -m experiments.bench.child COMPARISON SIDE` prints it as JSON."""

from __future__ import annotations

import json
import sys

from experiments.bench.compare import comparisons

if __name__ == "__main__":
    comparison, side = sys.argv[1:]
    found = comparisons()[comparison].sides[side]()
    print(json.dumps({"seconds": found.seconds, "extra_mb": found.extra_mb, **found.facts}))
