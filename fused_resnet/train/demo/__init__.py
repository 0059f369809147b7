"""The demo: trains a ResNet on real handwritten digits, fused and stock side by side, and writes a report."""
