"""Figures and the token page."""
