"""A web page on this machine to try a model on, the command ``lsnet-demo``."""
