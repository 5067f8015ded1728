"""Ablations: a list of variants, equal training FLOPs for each, one table."""
