"""Keys and values of text that was computed before, used wherever in a prompt it stands again.

Shapes: N tokens of a prompt, T tokens of a chunk, H query heads, K key/value heads, D head size.
Positions are those of the prompt, from 0 on.
"""
