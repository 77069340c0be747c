"""Number formats and sparsifiers: fixed-size records per block of coordinates (`compression.scheme`)."""
