"""Decides what runs when, and tells who waits. Knows no tensor: it never imports torch."""
