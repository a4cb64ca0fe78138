"""The bundled engine: tokens in, tokens out, in a process of its own."""
