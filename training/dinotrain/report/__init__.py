"""The training report: plots, pictures and tables of a run, as one HTML file for people."""
