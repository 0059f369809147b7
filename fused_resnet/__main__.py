"""`python -m fused_resnet` is the command line `fused-resnet`."""

import sys

from fused_resnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
