"""Target-neutral rewrites of the deploy model, one per file, listed in order as objects."""
