"""Synthetic data whose labels are true by construction; nothing here depicts a person."""
