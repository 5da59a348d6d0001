"""Published weights of the convolutional backbones by name: timm's repositories on the hub.

``hub.fetch`` downloads and verifies them. Source: METHODS G; timm 1.0.31.
"""

TAGS: dict[str, tuple[str, ...]] = {
    "seresnet50": ("ra2_in1k", "a1_in1k", "a2_in1k", "a3_in1k"),
    "efficientnet_b0": ("ra_in1k",),
    "efficientnet_b1": ("ft_in1k",),
    "efficientnet_b2": ("ra_in1k",),
    "efficientnet_b3": ("ra2_in1k",),
    "efficientnet_b4": ("ra2_in1k",),
    "efficientnet_b5": ("sw_in12k_ft_in1k", "sw_in12k"),
    "tf_efficientnet_b0": ("ns_jft_in1k", "aa_in1k", "in1k"),
    "tf_efficientnet_b1": ("ns_jft_in1k", "aa_in1k", "in1k"),
    "tf_efficientnet_b2": ("ns_jft_in1k", "aa_in1k", "in1k"),
    "tf_efficientnet_b3": ("ns_jft_in1k", "aa_in1k", "in1k"),
    "tf_efficientnet_b4": ("ns_jft_in1k", "aa_in1k", "in1k"),
    "tf_efficientnet_b5": ("ns_jft_in1k", "ra_in1k", "aa_in1k", "in1k"),
    "tf_efficientnet_b6": ("ns_jft_in1k", "aa_in1k"),
    "tf_efficientnet_b7": ("ns_jft_in1k", "ra_in1k", "aa_in1k"),
}
"""Architecture → what it was trained on, the first by default. Plain B6 and B7 were never trained.

Absent are ``ap_in1k`` and ``ra4_e3600_*``, which expect other pixels than ImageNet's mean and
standard deviation make."""

REPOSITORIES: dict[str, str] = {
    **{name: f"timm/{name}.{tags[0]}" for name, tags in TAGS.items()},
    **{f"{name}.{tag}": f"timm/{name}.{tag}" for name, tags in TAGS.items() for tag in tags},
}
"""Hub name → repository: ``seresnet50``, or with its training ``seresnet50.a1_in1k``."""
