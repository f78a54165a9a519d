"""How near is equal: the project's numeric tolerances, each with its reason (measured when the fixtures were made)."""

# The authors' own code moves its activations by up to 1.1e-5 between kernels of the same machine.
ACTIVATIONS = {"atol": 1e-4, "rtol": 0.0}
# Losses are sums over frames: their relative error is that of one activation.
LOSSES = {"atol": 0.0, "rtol": 1e-5}
# A perturbation of 6e-8 of the weights moves the step-1 gradients by up to 1.8e-6.
GRADIENTS = {"atol": 1e-5, "rtol": 1e-4}
# ... and, over the eight steps, weights by 7.1e-6 and the teacher by 2.9e-6.
WEIGHTS = {"atol": 2e-5, "rtol": 0.0}
# ... and codebook sums by 7.9e-6; hundreds of frames are added up in another order.
CODEBOOK_SUMS = {"atol": 1e-4, "rtol": 0.0}
CODEBOOK_COUNTS = {"atol": 1e-6, "rtol": 1e-6}
# The gradient of a key bias is exactly zero in theory: Adam blows its rounding noise up to full steps.
KEY_BIASES = {"atol": 1e-3, "rtol": 0.0}
# The same arithmetic in another grouping (alone or in a batch, eager or sdpa), float32.
SAME_ARITHMETIC = {"atol": 1e-5, "rtol": 0.0}
