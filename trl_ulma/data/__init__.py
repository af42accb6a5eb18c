"""Converts raw rows to pointwise rows, with one file per family of datasets."""
