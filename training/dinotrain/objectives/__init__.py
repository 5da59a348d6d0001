"""Objectives: what training minimises per family of tasks, and how predictions are judged."""
