"""Studies: tables of training runs × seeds, resumable, compared, and drawn on one page."""
