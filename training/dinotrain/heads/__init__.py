"""Heads: the light, trained part between frozen features and logits."""
