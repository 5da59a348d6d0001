"""Speed beside the peers': one ViT-S/14, exported as their users and as ours would, timed in one
run: ``python -m dinobench.peers``.
"""
