"""The mathematics: pure functions on arrays, no Flax.

Each family has a folder (`ttt`, `ssm`, `attention`) with its public function, the definition it is tested against, and
every faster implementation in a file of its own. Common to all families are `documents` (which tokens of a sequence
belong together), `conv` and `rope`.
"""
