"""Lossless coders of the integers in records: bit packing, Rice, Elias-Fano, rANS. One byte string per value."""
