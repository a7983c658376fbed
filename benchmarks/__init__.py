"""Measurements of aiordt beside its peers: ``python -m benchmarks p2p|statedict|slices|view``."""
