"""Translate FX nodes into index expressions and back: the lifter with its rules, and the emitter."""
