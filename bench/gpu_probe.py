"""What fused convolution graphs cuDNN has for this GPU: bench/gpu/probe.py under a short name."""

import sys

from gpu.probe import main

if __name__ == "__main__":
    sys.exit(main())
