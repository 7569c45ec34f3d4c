"""Candidates ranked by a criterion, and the selection exported for trainers."""
