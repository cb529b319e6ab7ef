"""Serving a trained model from a group of replicas, one of which is the primary."""
