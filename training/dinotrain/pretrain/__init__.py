"""Training backbones: dense supervision on rendered images; self-supervision is to come."""
