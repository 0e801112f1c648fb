"""Algorithms written from their papers, in float64 loops; never imported by the package."""
