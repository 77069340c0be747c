"""How bytes reach other members. `grpc.py` is the real one; the simulator brings its own."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # must be there before gRPC is first imported
