"""What runs faster than torch's own operations on a GPU; triton is imported by `head` alone."""
