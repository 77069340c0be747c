"""Rows and weights in, one update out; and the outer step that applies it to the anchor.

What goes here: rules, weight policies, outer optimisers, push-sum algebra. What does not: bytes, peers, clocks.
"""
