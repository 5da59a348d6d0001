"""Speed beside the peers': the same ViT-S/14 as their users and as ours would export it, timed in one
run: ``python -m dinobench.peers``.
"""
