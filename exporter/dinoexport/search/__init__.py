"""``--precision auto``: the smallest or fastest recipe whose error holds a budget."""
