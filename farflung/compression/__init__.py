"""Vector <-> payload. Codecs are values made of pure functions; their state belongs to the caller.

What goes here: number formats, sparsifiers, wrappers such as error feedback, and their kernels. What does not:
anything about who sent a payload or how payloads are combined.
"""
