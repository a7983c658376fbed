"""Transfers without end and peers that come and go; ``python -m tests.soak`` runs them long."""
