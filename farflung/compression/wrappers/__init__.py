"""Codecs around codecs: what is sent when, and what becomes of the rest."""
