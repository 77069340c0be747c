"""Changes of basis before a codec and after it: permutations, rotations, DCT, low rank, sketches."""
