"""Fused attention ops."""
