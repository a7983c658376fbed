"""Seeded trials of real actors under faults; ``python -m tests.battery`` runs many."""
