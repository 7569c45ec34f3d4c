"""Which weights a verb works on: patterns, candidates, trainer configs."""
