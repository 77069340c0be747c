"""How bytes reach other members. `grpc.py` is the real one; the simulator brings its own."""
