"""Data: pictures and labels from files, checked, as samples of a task."""
