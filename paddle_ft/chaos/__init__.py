"""Faults on purpose: plans of them, the hands that do them, and a report of what came of each."""
