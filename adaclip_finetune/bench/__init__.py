"""`adaclip bench`: how fast this package is beside plain implementations, measured in turns within one run."""
