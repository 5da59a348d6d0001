"""Losses: one file per family. Missing labels are masked, never imputed."""
