"""The judge at work: the learned pair model on onnxruntime, beside the guards of `policies`."""
