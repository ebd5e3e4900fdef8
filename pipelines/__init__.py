"""The importable pieces of dalitune, in layers: each imports only from those before it (docs/design.md)."""

import os

# OpenMP's threads spin while they wait, on the very cores that decode the photos; on a busy machine that makes a CPU
# training many times slower. Read when torch is loaded, hence here, and hence first-party imports come first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Since 1.29 onnxruntime sends events to its makers unless it finds this as it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
