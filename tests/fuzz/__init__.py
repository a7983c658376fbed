"""Arbitrary bytes against all that reads bytes of others: ``make fuzz``."""
