"""Raw rows in, point-wise rows out: one file a family of data sets."""
