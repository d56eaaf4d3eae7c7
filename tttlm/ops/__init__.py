"""The mathematics: pure functions on arrays, no Flax.

One family a folder (`ttt`, `ssm`, `attention`), each with its public function, the definition it is tested
against, and every faster implementation in a file of its own. What the families share is here: `documents` (which
tokens of a row belong together), `conv` and `rope`.
"""
