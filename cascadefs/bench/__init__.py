"""Benchmarks. io: measures of a directory; targets: the places to measure; report: figures, ratios, verdicts.

Imports nothing here: io is also run as a program (`python -m cascadefs.bench.io`) and must be loaded once only.
"""
