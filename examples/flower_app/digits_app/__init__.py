"""Digits on Flower."""
