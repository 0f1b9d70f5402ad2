"""Digits seen and heard: what disentangled gradient learning (DGL) does, and what it does not."""
