"""Benches: what codecs cost and what training makes of them; and what `farflung bench` prints."""
