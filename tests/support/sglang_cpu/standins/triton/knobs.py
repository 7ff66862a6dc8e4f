"""No hooks to hang on: kernels are neither compiled nor loaded."""

runtime = compilation = None
