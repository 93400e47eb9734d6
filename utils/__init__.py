"""Sieve's parts, floor by floor; see README for what lies where."""
